// Sums of the rows and columns of a matrix with a few vectors, and how long rows and columns are, in one read of it.
//
// Rows are taken a few at a time, so that each part of a vector that was loaded serves all of them; columns of a panel of
// rows follow while it is in the second-level cache. Sums run in each lane for itself, and over rows for kFlush rows at
// most before they go on in double. Squares that may leave float's range are summed again in double.
#pragma once

#include <type_traits>

#include "simd.h"
#include "sums_types.h"

namespace tempo::TEMPO_ISA {

constexpr int64_t kPanel = 8;    // rows whose columns are summed together
constexpr int64_t kFlush = 256;  // rows, of whole panels

// Within these, a sum of squares has lost nothing that counts.
constexpr float kLeastSquare = 0x1p-80f, kMostSquare = 0x1p100f;

typedef double Doubles __attribute__((vector_size(kLanes * 8)));

// Lanes from `valid` on are zero.
template <typename T>
inline Vector load_some(const T *from, int64_t valid) {
    if (valid >= kLanes) return load(from);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < valid; ++i) lanes[i] = widen(from[i]);
    return load(lanes);
}

template <typename F>
inline void with_count(int count, const F &f) {
    switch (count) {
        case 0: return f(std::integral_constant<int, 0>{});
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, 8>{});
    }
}

template <typename T>
double square_in_double(const T *x, int64_t count, int64_t stride) {
    double lanes[8] = {};
    for (int64_t i = 0; i < count; ++i) {
        const double value = widen(x[i * stride]);
        lanes[i % 8] += value * value;
    }
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// `K` vectors from `first` on with `R` rows from `row` on; `packed` has the K parts for the same columns side by side.
template <int K, int R, typename T>
inline void sum_rows(const Sums &s, const T *x, int64_t stride, int64_t row, int first, const float *packed,
                     float *squares) {
    Vector total[R][K + 1] = {};
    const auto add = [&](const Vector (&values)[R]) {
        for (int k = 0; k < K; ++k) {
            const Vector v = load(packed + k * kLanes);
            for (int r = 0; r < R; ++r) total[r][k] += values[r] * v;
        }
        for (int r = 0; r < R; ++r) total[r][K] += values[r] * values[r];
        packed += K * kLanes;
    };
    int64_t column = 0;
    for (; column + kLanes <= s.columns; column += kLanes) {
        Vector values[R];
        for (int r = 0; r < R; ++r) {
            values[r] = load(x + r * stride + column);
            __builtin_prefetch(x + (r + R) * stride + column);  // rows are too short for the processor to see a stream
        }
        add(values);
    }
    if (column < s.columns) {
        Vector values[R];
        for (int r = 0; r < R; ++r) values[r] = load_some(x + r * stride + column, s.columns - column);
        add(values);
    }
    for (int r = 0; r < R; ++r) {
        for (int k = 0; k < K; ++k) s.of_rows[(first + k) * s.rows + row + r] = sum(total[r][k]);
        squares[r] = sum(total[r][K]);
    }
}

// All vectors with `R` rows.
template <int R, typename T>
inline void all_sums_of_rows(const Sums &s, const T *x, int64_t stride, int64_t row, float *squares) {
    int first = 0;
    do {  // at least once: squares are wanted even without vectors
        const int some = s.vectors - first < kVectorsAtOnce ? s.vectors - first : kVectorsAtOnce;
        with_count(some, [&](auto count) {
            sum_rows<decltype(count)::value, R>(s, x, stride, row, first, s.packed + first * padded(s.columns),
                                                squares);
        });
        first += some;
    } while (first < s.vectors);
}

// Adds `K` weights from `first` on times a panel of `count` rows to `totals`, by C vectors of columns at a time.
template <int K, int C, bool kWhole, typename T>
inline void sum_columns(const Sums &s, const T *x, int64_t stride, int64_t row, int count, int first, int64_t column,
                        bool squares, float *totals) {
    const int64_t width = padded(s.columns);
    Vector total[C][K + 1];
    float *lines[K + 1];
    for (int k = 0; k < K; ++k) lines[k] = totals + (first + k) * width + column;
    lines[K] = totals + s.weights * width + column;
    for (int c = 0; c < C; ++c)
        for (int k = 0; k <= K; ++k) total[c][k] = load(lines[k] + c * kLanes);
    const float *q = s.q + first * s.rows + row;
    for (int r = 0; r < count; ++r) {
        Vector values[C];
        for (int c = 0; c < C; ++c)
            values[c] = kWhole ? load(x + r * stride + column + c * kLanes)
                               : load_some(x + r * stride + column, s.columns - column);
        for (int k = 0; k < K; ++k) {
            const Vector weight = broadcast(q[k * s.rows + r]);
            for (int c = 0; c < C; ++c) total[c][k] += values[c] * weight;
        }
        for (int c = 0; c < C; ++c) total[c][K] += values[c] * values[c];
    }
    for (int c = 0; c < C; ++c)
        for (int k = 0; k < K + squares; ++k) store(lines[k] + c * kLanes, total[c][k]);
}

template <typename T>
inline void all_sums_of_columns(const Sums &s, const T *x, int64_t stride, int64_t row, int count, float *totals) {
    int first = 0;
    do {
        const int some = s.weights - first < kVectorsAtOnce ? s.weights - first : kVectorsAtOnce;
        with_count(some, [&](auto vectors) {
            constexpr int K = decltype(vectors)::value;
            constexpr int C = K <= 4 ? 2 : 1;  // as many as there are registers for
            int64_t column = 0;
            for (; column + C * kLanes <= s.columns; column += C * kLanes)
                sum_columns<K, C, true>(s, x, stride, row, count, first, column, first == 0, totals);
            for (; column < s.columns; column += kLanes)
                sum_columns<K, 1, false>(s, x, stride, row, count, first, column, first == 0, totals);
        });
        first += some;
    } while (first < s.weights);
}

// Moves what was summed over the rows from `start` to `end` on to totals in double.
template <typename T>
void flush(const Sums &s, const T *x, int64_t stride, int64_t start, int64_t end, bool in_range, float *recent) {
    const int64_t width = padded(s.columns);
    const int64_t count = width * (s.weights + (in_range ? 1 : 0));
    for (int64_t i = 0; i < count; i += kLanes) {
        Doubles total;
        std::memcpy(&total, s.totals + i, sizeof total);
        total += __builtin_convertvector(load(recent + i), Doubles);
        std::memcpy(s.totals + i, &total, sizeof total);
        store(recent + i, Vector{});
    }
    if (in_range) return;
    for (int64_t column = 0; column < s.columns; ++column) {
        s.totals[s.weights * width + column] += square_in_double(x + start * stride + column, end - start, stride);
        recent[s.weights * width + column] = 0;
    }
}

// For every vector of columns, its part of each of `count` vectors side by side.
inline void pack(const float *v, int count, int64_t columns, float *to) {
    for (int64_t column = 0; column < columns; column += kLanes)
        for (int k = 0; k < count; ++k, to += kLanes) store(to, load_some(v + k * columns + column, columns - column));
}

inline void pack(const Sums &s) {
    for (int first = 0; first < s.vectors; first += kVectorsAtOnce) {
        const int some = s.vectors - first < kVectorsAtOnce ? s.vectors - first : kVectorsAtOnce;
        pack(s.v + first * s.columns, some, s.columns, s.packed + first * padded(s.columns));
    }
}

template <typename T>
void sums_of(const Sums &s) {
    constexpr int R = 2;
    const T *x = static_cast<const T *>(s.x);
    T *copy = static_cast<T *>(s.copy);
    const int64_t stride = copy ? s.columns : s.stride, width = padded(s.columns);
    float *recent = s.packed + s.vectors * width;
    pack(s);
    for (int64_t i = 0; s.by_column && i < width * (s.weights + 1); ++i) recent[i] = 0, s.totals[i] = 0;

    float longest = 0;
    bool in_range = true;
    int64_t start = 0;  // of what is in `recent`
    for (int64_t panel = 0; panel < s.rows; panel += kPanel) {
        const int64_t end = panel + kPanel < s.rows ? panel + kPanel : s.rows;
        for (int64_t row = panel; row < end; row += R) {
            const int count = row + R <= end ? R : 1;
            const T *rows = x + row * s.stride;
            if (copy) {
                for (int r = 0; r < count; ++r)
                    std::memcpy(copy + (row + r) * s.columns, x + (row + r) * s.stride, s.columns * sizeof(T));
                rows = copy + row * s.columns;
            }
            float squares[R];
            if (count == R)
                all_sums_of_rows<R>(s, rows, stride, row, squares);
            else
                all_sums_of_rows<1>(s, rows, stride, row, squares);
            for (int r = 0; r < count; ++r) {
                const float square = squares[r];
                const bool exact = square > kLeastSquare && square < kMostSquare;
                s.row_lengths[row + r] =
                    __builtin_sqrt(exact ? double(square) : square_in_double(rows + r * stride, s.columns, 1));
                in_range = in_range && square < kMostSquare;  // false for what is not a number
                if (square > longest) longest = square;
            }
        }
        if (!s.by_column) continue;
        const T *read = copy ? copy : x;
        all_sums_of_columns(s, read + panel * stride, stride, panel, int(end - panel), recent);
        if (end == s.rows || end - start >= kFlush) {
            flush(s, read, stride, start, end, in_range && longest > kLeastSquare, recent);
            longest = 0, in_range = true, start = end;
        }
    }
    for (int64_t column = 0; s.by_column && column < s.columns; ++column) {
        for (int k = 0; k < s.weights; ++k) s.of_columns[k * s.columns + column] = float(s.totals[k * width + column]);
        s.column_lengths[column] = __builtin_sqrt(s.totals[s.weights * width + column]);
    }
}

inline void sums(const Sums &s) { s.half ? sums_of<uint16_t>(s) : sums_of<float>(s); }

}  // namespace tempo::TEMPO_ISA
