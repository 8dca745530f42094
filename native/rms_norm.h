// Rows over their root mean square, times a weight, and the gradient: each row is read from memory once.
#pragma once

#include "activation.h"
#include "layers_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

// Calls f(first, count, which) for the vectors of a row; `which` of two alternates, for sums that do not wait.
template <typename F>
inline void for_row(int64_t width, const F &f) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) f(i, kLanes, 0), f(i + kLanes, kLanes, 1);
    for (; i < width; i += kLanes) f(i, width - i < kLanes ? width - i : kLanes, 0);
}

// Sums in float run over so many elements at most of each lane, or what is added to a long one would be rounded away.
constexpr int64_t kSummed = 64;

// The sum over a row of what f(first, count) gives.
template <typename F>
inline double sum_row(int64_t width, const F &f) {
    double total = 0;
    for (int64_t start = 0; start < width; start += 2 * kSummed * kLanes) {
        const int64_t left = width - start, count = left < 2 * kSummed * kLanes ? left : 2 * kSummed * kLanes;
        Vector sums[2] = {};
        for_row(count, [&](int64_t i, int64_t n, int which) __attribute__((always_inline)) {
            sums[which] += f(start + i, n);
        });
        total += double(sum(sums[0] + sums[1]));
    }
    return total;
}

template <bool streaming>
void rms_norm_as(const RmsNorm &a) {
    for (int64_t row = 0; row < a.rows; ++row) {
        const float *x = a.x + row * a.width, *weight = a.weight;
        float *y = a.out + row * a.width;
        const double square = sum_row(a.width, [=](int64_t i, int64_t n) __attribute__((always_inline)) {
            const Vector v = load_first(x + i, n);
            return v * v;
        });
        const float inverse = a.inverse[row] = float(1 / __builtin_sqrt(square / double(a.width) + double(a.eps)));
        for_row(a.width, [=](int64_t i, int64_t n, int) __attribute__((always_inline)) {
            put_first<streaming>(y + i, load_first(weight + i, n) * (load_first(x + i, n) * inverse), n);
        });
    }
}

// With u = weight · g and x̂ = x / rms(x): dx = (u - x̂ · mean(u · x̂)) / rms(x).
template <bool streaming>
void rms_norm_gradient_as(const RmsNorm &a) {
    for (int64_t row = 0; row < a.rows; ++row) {
        const float *x = a.x + row * a.width, *g = a.g + row * a.width, *weight = a.weight;
        float *dx = a.out + row * a.width;
        const float inverse = a.inverse[row];
        const double product = sum_row(a.width, [=](int64_t i, int64_t n) __attribute__((always_inline)) {
            return load_first(weight + i, n) * load_first(g + i, n) * (load_first(x + i, n) * inverse);
        });
        const float mean = float(product / double(a.width));
        for_row(a.width, [=](int64_t i, int64_t n, int) __attribute__((always_inline)) {
            const Vector u = load_first(weight + i, n) * load_first(g + i, n);
            put_first<streaming>(dx + i, (u - load_first(x + i, n) * inverse * mean) * inverse, n);
        });
    }
}

inline void rms_norm(const RmsNorm &a) {
    const bool streaming = a.rows * a.width > kCached && a.width % kLanes == 0 && aligned(a.out);
    if (a.g == nullptr)
        streaming ? rms_norm_as<true>(a) : rms_norm_as<false>(a);
    else
        streaming ? rms_norm_gradient_as<true>(a) : rms_norm_gradient_as<false>(a);
    fence();
}

}  // namespace tempo::TEMPO_ISA
