// A few steps of the Lanczos process, each in one read of the matrix: what a part of it was multiplied by is multiplied
// back while it is in the caches.
#pragma once

#include "lanczos_types.h"
#include "simd.h"
#include "sums.h"

namespace tempo::TEMPO_ISA {

constexpr int kLanczosRows = 4;  // read together

struct SomeRows {
    const float *at[kLanczosRows];
};

// The scalar product of each row with `v`.
inline void multiply(const SomeRows &rows, const float *v, int64_t count, float (&products)[kLanczosRows]) {
    Vector total[kLanczosRows] = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vector some = load_some(v + i, count - i);
        for (int r = 0; r < kLanczosRows; ++r) total[r] += some * load_some(rows.at[r] + i, count - i);
    }
    for (int r = 0; r < kLanczosRows; ++r) products[r] = sum(total[r]);
}

// Adds each row so many times to `v`.
inline void add(const SomeRows &rows, const float (&times)[kLanczosRows], float *v, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Vector total = load(v + i);
        for (int r = 0; r < kLanczosRows; ++r) total += broadcast(times[r]) * load(rows.at[r] + i);
        store(v + i, total);
    }
    for (; i < count; ++i)
        for (int r = 0; r < kLanczosRows; ++r) v[i] += times[r] * rows.at[r][i];
}

// `f` of all rows by four, with the first and how many are real; others are the last one again.
template <typename F>
inline void by_rows(const float *x, int64_t rows, int64_t stride, const F &f) {
    for (int64_t row = 0; row < rows; row += kLanczosRows) {
        const int real = rows - row < kLanczosRows ? int(rows - row) : kLanczosRows;
        SomeRows some;
        for (int r = 0; r < kLanczosRows; ++r) some.at[r] = x + (row + least(r, real - 1)) * stride;
        f(some, row, real);
    }
}

// image = w wᵀ z, or wᵀ w z.
inline void apply(const Lanczos &l, const float *z, float *image, float *between) {
    for (int64_t i = 0; i < l.side(); ++i) image[i] = 0;
    float products[kLanczosRows];
    if (l.rows > l.columns) {
        by_rows(l.w, l.rows, l.stride, [&](const SomeRows &rows, int64_t, int real) {
            multiply(rows, z, l.columns, products);
            for (int r = real; r < kLanczosRows; ++r) products[r] = 0;
            add(rows, products, image, l.columns);
        });
        return;
    }
    const int64_t step = lanczos_columns(l);
    for (int64_t column = 0; column < l.columns; column += step) {
        const int64_t count = l.columns - column < step ? l.columns - column : step;
        for (int64_t i = 0; i < count; ++i) between[i] = 0;
        by_rows(l.w + column, l.rows, l.stride, [&](const SomeRows &rows, int64_t row, int real) {
            for (int r = 0; r < kLanczosRows; ++r) products[r] = r < real ? z[row + r] : 0;
            add(rows, products, between, count);
        });
        by_rows(l.w + column, l.rows, l.stride, [&](const SomeRows &rows, int64_t row, int real) {
            multiply(rows, between, count, products);
            for (int r = 0; r < real; ++r) image[row + r] += products[r];
        });
    }
}

inline float length(const float *v, int64_t count) { return float(__builtin_sqrt(square_in_double(v, count, 1))); }

inline void lanczos(const Lanczos &l) {
    const int64_t side = l.side();
    float *image = l.memory, *between = image + side;
    for (int step = 0; step < l.steps; ++step) {
        apply(l, l.basis + step * side, image, between);
        const float whole = length(image, side);
        for (int again = 0; again < 2; ++again)  // once more, since rounding leaves a part
            by_rows(l.basis, step + 1, side, [&](const SomeRows &rows, int64_t row, int real) {
                float along[kLanczosRows];
                multiply(rows, image, side, along);
                for (int r = 0; r < kLanczosRows; ++r) {
                    if (r < real && !again) l.projected[(row + r) * l.steps + step] = along[r];
                    along[r] = r < real ? -along[r] : 0;
                }
                add(rows, along, image, side);
            });
        if (step + 1 == l.steps) return;
        const float rest = length(image, side);
        // Nothing is left where the vector's directions are exhausted; further nodes then have no share.
        const float scale = rest > 1e-5f * whole ? 1 / rest : 0;
        for (int64_t i = 0; i < side; ++i) l.basis[(step + 1) * side + i] = image[i] * scale;
    }
}

}  // namespace tempo::TEMPO_ISA
