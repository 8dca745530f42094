// Haar orthogonal matrices, as products of reflections: see src/tempo/schemes/haar.py.
//
// Reflection k is 1 - tau v vᵀ with v in column k of a lower triangle. Four at a time are applied to two vectors of
// columns, as 1 - V T Vᵀ, whose T is solved for on the way.
#pragma once

#include <type_traits>
#include <utility>

#include "gaussians.h"
#include "haar_types.h"

namespace tempo::TEMPO_ISA {

template <typename Real>
using VectorOf = std::conditional_t<std::is_same_v<Real, float>, Vector, Reals>;

template <typename Real>
constexpr int kWide = sizeof(VectorOf<Real>) / sizeof(Real);

template <typename Real>
struct Reflections {
    int64_t side, line;
    Real *v;            // (side, line)
    Real *tau, *signs;  // (line): signs are of the matrix's columns
    Real *next, *over;  // (line): vᵀv of column k and of the one after it, the one after that; in turn within four
    Real *panel;        // (side, 2 vectors): columns of the matrix
};

// Every element, from the `by`-th one after it within four.
template <int by, typename V, size_t... i>
inline V turned(V v, std::index_sequence<i...>) {
    return __builtin_shufflevector(v, v, int((i & ~size_t(3)) | ((i + by) & 3))...);
}

typedef float Halves __attribute__((vector_size(kDoubles * 4)));
inline Reals in_double(const float *from) { return __builtin_convertvector(load_as<Halves>(from), Reals); }
inline Reals in_double(const double *from) { return load_as<Reals>(from); }
inline void rounded_to(float *to, Reals v) { store_as(to, __builtin_convertvector(v, Halves)); }
inline void rounded_to(double *to, Reals v) { store_as(to, v); }

template <typename Real>
inline void prepare(const Reflections<Real> &r, const Real *triangle) {
    using V = VectorOf<Real>;
    constexpr std::make_index_sequence<size_t(kWide<Real>)> lanes{};
    for (int64_t i = 0; i < r.side; triangle += ++i) {
        std::memcpy(r.v + i * r.line, triangle, size_t(i + 1) * sizeof *triangle);
        for (int64_t k = i + 1; k < r.line; ++k) r.v[i * r.line + k] = 0;
    }
    // In double: a reflection is as orthogonal as its tau is exact.
    for (int64_t column = 0; column < r.line; column += kDoubles) {
        Real *const from = r.v + column;
        Reals squares{};
        for (int64_t i = column; i < r.side; ++i) {
            const Reals x = in_double(from + i * r.line);
            squares += x * x;
        }
        const int64_t here = r.side - column < kDoubles ? r.side - column : kDoubles;
        Reals first = 1.0 - Reals{};
        for (int64_t k = 0; k < here; ++k) first[k] = from[k * (r.line + 1) + column * r.line];
        for (int64_t k = here < 0 ? 0 : here; k < kDoubles; ++k) squares[k] = 1.0;  // a tau that is finite
        const Reals sign = pick(first < 0.0, -1.0 - Reals{}, 1.0 - Reals{});
        const Reals leading = first + sign * root(squares);
        for (int64_t k = 0; k < here; ++k) from[k * (r.line + 1) + column * r.line] = Real(leading[k]);
        Real exact[kDoubles];
        rounded_to(exact, leading);
        const Reals kept = in_double(exact);
        rounded_to(r.tau + column, 2.0 / (squares - first * first + kept * kept));
        rounded_to(r.signs + column, -sign);
    }
    for (int64_t column = 0; column < r.line; column += kWide<Real>) {
        V next{}, over{};
        for (int64_t i = column; i < r.side; ++i) {
            const V x = load_as<V>(r.v + i * r.line + column);
            next += x * turned<1>(x, lanes);
            over += x * turned<2>(x, lanes);
        }
        store_as(r.next + column, next);
        store_as(r.over + column, over);
    }
}

// Reflections `k` to `k` + 3, on `J` vectors of columns: the last one first.
template <int J, typename Real>
inline void reflect(const Reflections<Real> &r, int64_t k, Real *columns) {
    using V = VectorOf<Real>;
    constexpr int64_t wide = kWide<Real>;
    V w[4][J] = {};
    for (int64_t i = k; i < r.side; ++i) {
        const Real *v = r.v + i * r.line + k;
        for (int j = 0; j < J; ++j) {
            const V x = load_as<V>(columns + i * 2 * wide + j * wide);
            for (int a = 0; a < 4; ++a) w[a][j] += v[a] * x;
        }
    }
    const Real *tau = r.tau + k, *next = r.next + k, *over = r.over + k;
    for (int j = 0; j < J; ++j) {
        w[3][j] *= tau[3];
        w[2][j] = tau[2] * (w[2][j] - next[2] * w[3][j]);
        w[1][j] = tau[1] * (w[1][j] - next[1] * w[2][j] - over[1] * w[3][j]);
        w[0][j] = tau[0] * (w[0][j] - next[0] * w[1][j] - over[0] * w[2][j] - next[3] * w[3][j]);
    }
    for (int64_t i = k; i < r.side; ++i) {
        const Real *v = r.v + i * r.line + k;
        for (int j = 0; j < J; ++j) {
            Real *at = columns + i * 2 * wide + j * wide;
            V x = load_as<V>(at);
            for (int a = 0; a < 4; ++a) x -= v[a] * w[a][j];
            store_as(at, x);
        }
    }
}

template <typename Real>
inline void orthogonal_as(const Haar<Real> &h) {
    constexpr int64_t wide = kWide<Real>;
    const int64_t side = h.side, line = haar_line(side), triangle = side * (side + 1) / 2;
    Real *lines = h.memory + side * line;
    const Reflections<Real> r{side,  line,         h.memory,         lines, lines + line, lines + 2 * line,
                              lines + 3 * line, lines + 4 * line};
    for (int64_t block = 0; block < h.count; ++block) {
        prepare(r, h.gaussians + block * triangle);
        for (int64_t column = 0; column < side; column += 2 * wide) {
            const int64_t left = side - column, here = left < 2 * wide ? left : 2 * wide;
            for (int64_t i = 0; i < side * 2 * wide; ++i) r.panel[i] = 0;
            for (int64_t j = 0; j < here; ++j) r.panel[(column + j) * 2 * wide + j] = r.signs[column + j];
            // Further reflections leave these columns alone.
            for (int64_t k = (column + here - 1) / 4 * 4; k >= 0; k -= 4) {
                if (k >= column + wide)
                    reflect<1>(r, k, r.panel + wide);
                else if (here <= wide)
                    reflect<1>(r, k, r.panel);
                else
                    reflect<2>(r, k, r.panel);
            }
            Real *to = h.q + block * side * side + column;
            for (int64_t i = 0; i < side; ++i)
                std::memcpy(to + i * side, r.panel + i * 2 * wide, size_t(here) * sizeof(Real));
        }
    }
}

inline void orthogonal(const Haar<double> &h) { orthogonal_as(h); }
inline void orthogonal_single(const Haar<float> &h) { orthogonal_as(h); }

}  // namespace tempo::TEMPO_ISA
