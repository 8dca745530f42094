// Products of a tall matrix with a few vectors, on either side, in one read of it; and rows of such a product.
//
// A panel of rows stays in the second-level cache while all is made of it, which libraries' kernels for square matrices
// do not see to; sums run in registers, of as many rows or columns as there are registers for.
#pragma once

#include "low_rank_types.h"
#include "simd.h"
#include "sums.h"

namespace tempo::TEMPO_ISA {

constexpr int kRowsAtOnce = kLanes / 2;  // so that sums with two vectors fill one vector
constexpr int64_t kWideColumns = 1024;   // of so many rows: they stay in the first-level cache

// Sums of each of the lanes of `v`: lane i is that of v[i].
inline Vector sums_of_lanes(Vector (&v)[kLanes]) {
    transpose(v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}

// Adds the columns from `start` to `end` of a few rows with two vectors to `totals`.
template <typename T>
inline void add_of_rows(const T *const *rows, const float *first, const float *second, int64_t start, int64_t end,
                        float *totals) {
    Vector total[kLanes];
    for (int i = 0; i < kLanes; ++i) total[i] = start ? load(totals + i * kLanes) : Vector{};
    int64_t column = start;
    for (; column + kLanes <= end; column += kLanes) {
        const Vector a = load(first + column), b = load(second + column);
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const Vector x = load(rows[r] + column);
            total[r * 2] += x * a;
            total[r * 2 + 1] += x * b;
        }
    }
    if (column < end) {
        const Vector a = load_some(first + column, end - column), b = load_some(second + column, end - column);
        for (int r = 0; r < kRowsAtOnce; ++r) {
            const Vector x = load_some(rows[r] + column, end - column);
            total[r * 2] += x * a;
            total[r * 2 + 1] += x * b;
        }
    }
    for (int i = 0; i < kLanes; ++i) store(totals + i * kLanes, total[i]);
}

template <typename T>
inline void all_of_rows(const Tall &t, int64_t panel, int64_t end) {
    for (int64_t row = panel; row < end; row += kRowsAtOnce) {
        const int count = end - row < kRowsAtOnce ? int(end - row) : kRowsAtOnce;
        const T *rows[kRowsAtOnce];  // where there are fewer, the last once more
        for (int r = 0; r < kRowsAtOnce; ++r)
            rows[r] = static_cast<const T *>(t.x) + (row + (r < count ? r : count - 1)) * t.stride;
        for (int64_t start = 0; start < t.columns; start += kWideColumns) {
            const int64_t stop = t.columns - start < kWideColumns ? t.columns : start + kWideColumns;
            float *totals = t.totals;
            for (int k = 0; k < t.vectors; k += 2, totals += kLanes * kLanes) {
                const float *first = t.v + k * t.columns, *second = k + 1 < t.vectors ? first + t.columns : first;
                add_of_rows(rows, first, second, start, stop, totals);
            }
        }
        const float *totals = t.totals;
        for (int k = 0; k < t.vectors; k += 2, totals += kLanes * kLanes) {
            Vector total[kLanes];
            for (int i = 0; i < kLanes; ++i) total[i] = load(totals + i * kLanes);
            float sums[kLanes];
            store(sums, sums_of_lanes(total));
            for (int r = 0; r < count; ++r) {
                float *to = t.of_rows + (row + r) * t.rows_stride + k;
                to[0] = sums[r * 2];
                if (k + 1 < t.vectors) to[1] = sums[r * 2 + 1];
            }
        }
    }
}

// Adds a panel's rows, each times its weights from `first` on, to one vector of columns.
template <int K, bool kWhole, typename T>
inline void add_of_columns(const Tall &t, int64_t panel, int64_t end, int first, int64_t column) {
    const int64_t left = t.columns - column;
    float *to = t.of_columns + first * t.columns + column;
    Vector totals[K];
    for (int k = 0; k < K; ++k)
        totals[k] = panel == 0 ? Vector{} : kWhole ? load(to + k * t.columns) : load_some(to + k * t.columns, left);
    const float *q = t.q + panel * t.q_stride + first;
    const T *x = static_cast<const T *>(t.x) + panel * t.stride + column;
    for (int64_t row = panel; row < end; ++row, q += t.q_stride, x += t.stride) {
        __builtin_prefetch(x + 8 * kLanes);  // too many rows for the processor to see streams
        const Vector v = kWhole ? load(x) : load_some(x, left);
        for (int k = 0; k < K; ++k) totals[k] += v * q[k];
    }
    for (int k = 0; k < K; ++k)
        if (kWhole)
            store(to + k * t.columns, totals[k]);
        else
            std::memcpy(to + k * t.columns, &totals[k], size_t(left) * sizeof *to);
}

template <int K, typename T>
inline void all_of_columns(const Tall &t, int64_t panel, int64_t end, int first) {
    int64_t column = 0;
    for (; column + kLanes <= t.columns; column += kLanes) add_of_columns<K, true, T>(t, panel, end, first, column);
    if (column < t.columns) add_of_columns<K, false, T>(t, panel, end, first, column);
}

template <typename T>
void products_of(const Tall &t) {
    for (int64_t panel = 0; panel < t.rows; panel += kTallPanel) {
        const int64_t end = t.rows - panel < kTallPanel ? t.rows : panel + kTallPanel;
        if (t.vectors) all_of_rows<T>(t, panel, end);
        int first = 0;
        for (; first + kLanes <= t.weights; first += kLanes) all_of_columns<kLanes, T>(t, panel, end, first);
        for (; first + 4 <= t.weights; first += 4) all_of_columns<4, T>(t, panel, end, first);
        for (; first < t.weights; ++first) all_of_columns<1, T>(t, panel, end, first);
    }
}

inline void tall_products(const Tall &t) { t.half ? products_of<uint16_t>(t) : products_of<float>(t); }

// Rows of `low` times `up`, each plus `bias` if there is one: R rows of C vectors of columns.
template <int R, int C, bool kWhole>
inline void low_rank_some(const LowRank &l, const float *bias, int64_t row, int64_t columns, int64_t column, float *to,
                        int64_t stride) {
    Vector totals[R][C];
    for (int c = 0; c < C; ++c) {
        const int64_t at = column + c * kLanes;
        const Vector start = !bias ? Vector{} : kWhole ? load(bias + at) : load_some(bias + at, columns - at);
        for (int r = 0; r < R; ++r) totals[r][c] = start;
    }
    const float *low = l.low + row * l.low_stride;
    for (int k = 0; k < l.rank; ++k) {
        const float *up = l.up + k * columns + column;
        Vector v[C];
        for (int c = 0; c < C; ++c)
            v[c] = kWhole ? load(up + c * kLanes) : load_some(up + c * kLanes, columns - column - c * kLanes);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) totals[r][c] += v[c] * low[r * l.low_stride + k];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(to + r * stride + column + c * kLanes, totals[r][c]);
}

constexpr int kLowRankRows = kLanes / 2;
static_assert(kLowRankRows <= kMostLowRankRows);

// `count` rows from `row` on, to memory whose rows are `stride` elements apart, and hold whole vectors.
inline void low_rank_rows(const LowRank &l, const float *bias, int64_t row, int count, int64_t columns, float *to,
                        int64_t stride) {
    if (count < kLowRankRows) {
        for (int r = 0; r < count; ++r)
            for (int64_t column = 0; column < columns; column += kLanes)
                low_rank_some<1, 1, false>(l, bias, row + r, columns, column, to + r * stride, stride);
        return;
    }
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
        low_rank_some<kLowRankRows, 2, true>(l, bias, row, columns, column, to, stride);
    for (; column < columns; column += kLanes)
        low_rank_some<kLowRankRows, 1, false>(l, bias, row, columns, column, to, stride);
}

}  // namespace tempo::TEMPO_ISA
