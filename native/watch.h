// Sums of the rows of what a sandwich reads, made of its own copy in the caches: what was summed is what is used. And of
// the rows and columns of what it writes, while that is in registers.
#pragma once

#include "sandwich_types.h"
#include "sums.h"

namespace tempo::TEMPO_ISA {

constexpr int kLine = 16;  // columns moved at a time: a cache line of each row
constexpr int kWatchedAtOnce = 64;  // columns that one sum in float runs over

// Vectors are taken in groups of kVectorsAtOnce. Each has lines of totals for its vectors and one for squares.
inline int groups(const Watch &watch) { return greatest(1, (watch.vectors + kVectorsAtOnce - 1) / kVectorsAtOnce); }

// Calls `f` for each group with how many vectors it has (at compile time), its first, and its first line of totals.
template <typename F>
inline void for_groups(const Watch &watch, const F &f) {
    for (int group = 0; group < groups(watch); ++group) {
        const int first = group * kVectorsAtOnce;
        with_count(least(kVectorsAtOnce, watch.vectors - first), [&](auto k) { f(k, first, first + group); });
    }
}

// Of each group, its vectors as `watch_chunk` takes them, or else as `watch_panel` does.
inline void pack(const Watch &watch, int width, bool chunks, float *to) {
    for_groups(watch, [&](auto k, int first, int) {
        constexpr int K = decltype(k)::value;
        const float *v = watch.v + int64_t(first) * width;
        if (chunks) return pack(v, K, width, to + first * padded(width));
        for (int column = 0; column < width; ++column)
            for (int i = 0; i < K; ++i) to[(int64_t(first) * width) + column * K + i] = v[int64_t(i) * width + column];
    });
}

// Of a transposed panel, `stride` lanes wide: totals[k][lane], the last line for squares.
template <int K>
inline void watch_panel(const float *lines, int used, int stride, int width, const float *v, float *totals) {
    for (int lane = 0; lane < used; lane += kLanes) {
        Vector total[K + 1] = {};
        for (int first = 0; first < width; first += kWatchedAtOnce) {
            const int end = first + kWatchedAtOnce < width ? first + kWatchedAtOnce : width;
            Vector part[K + 1] = {};
            for (int column = first; column < end; ++column) {
                const Vector x = load(lines + int64_t(column) * stride + lane);
                for (int k = 0; k < K; ++k) part[k] += x * broadcast(v[column * K + k]);
                part[K] += x * x;
            }
            for (int k = 0; k <= K; ++k) total[k] += part[k];
        }
        for (int k = 0; k <= K; ++k) store(totals + k * stride + lane, total[k]);
    }
}

// Of a chunk of rows, `stride` apart: adds to totals[row][k], a vector each, of `kinds` for every row. `packed` as `pack`
// in sums.h gives it.
template <int K>
inline void watch_chunk(const float *chunk, int rows, int stride, int width, const float *packed, int kinds,
                        float *totals) {
    for (int row = 0; row < rows; ++row, chunk += stride, totals += kinds * kLanes) {
        Vector total[K + 1];
        for (int k = 0; k <= K; ++k) total[k] = load(totals + k * kLanes);
        const float *v = packed;
        for (int column = 0; column < width; column += kLanes, v += K * kLanes) {
            const Vector x = load_some(chunk + column, width - column);
            for (int k = 0; k < K; ++k) total[k] += x * load(v + k * kLanes);
            total[K] += x * x;
        }
        for (int k = 0; k <= K; ++k) store(totals + k * kLanes, total[k]);
    }
}

// Notes what became of a row.
inline void watched(Watch &watch, int64_t row, int64_t rows, const float *totals, int stride) {
    for (int k = 0; k < watch.vectors; ++k) watch.sums[k * rows + row] = totals[(k + k / kVectorsAtOnce) * stride];
    const float square = totals[least(watch.vectors, kVectorsAtOnce) * stride];
    watch.lengths[row] = __builtin_sqrt(double(square));
    watch.finite = watch.finite && square < kMostSquare;  // false for what is not a number
    if (square > watch.longest) watch.longest = square;
}

// --- what is written ---

// As it is after it was written as a T.
template <typename T>
inline Vector rounded(Vector v, const T *) {
    T written[kLanes];
    store(written, v);
    return load(written);
}
inline Vector rounded(Vector v, const float *) { return v; }

// Of a panel of rows whose columns `line(column)` gives, a vector of rows each: totals[k][lane], squares last.
template <int K, typename Line>
inline void tally_rows(int width, const float *v, float *totals, const Line &line) {
    Vector total[K + 1] = {};
    for (int first = 0; first < width; first += kWatchedAtOnce) {
        const int end = least(first + kWatchedAtOnce, width);
        Vector part[K + 1] = {};
        for (int column = first; column < end; ++column) {
            const Vector x = line(column);
            for (int k = 0; k < K; ++k) part[k] += x * broadcast(v[column * K + k]);
            part[K] += x * x;
        }
        for (int k = 0; k <= K; ++k) total[k] += part[k];
    }
    for (int k = 0; k <= K; ++k) store(totals + k * kLine, total[k]);
}

// Adds kLanes rows of a vector of columns, each weighted by `weights[k][row]`, to lines of `recent`; and last squares, of
// rows that `weights` says are real.
inline void tally_columns(const Vector (&v)[kLanes], const float *weights, int count, float *recent, int64_t stride) {
    for (int k = 0; k < count; ++k, weights += kLine, recent += stride) {
        Vector total = load(recent);
        for (int i = 0; i < kLanes; ++i) total += v[i] * broadcast(weights[i]);
        store(recent, total);
    }
    Vector total = load(recent);
    for (int i = 0; i < kLanes; ++i) total += v[i] * (v[i] * broadcast(weights[i]));
    store(recent, total);
}

// Moves what was summed over some rows on to totals in double.
inline void settle(Tally &tally, int64_t width, int64_t least_rows) {
    if (tally.since < least_rows) return;
    for (int64_t i = 0; i < (tally.weights + 1) * padded(width); ++i) {
        tally.totals[i] += tally.recent[i];
        tally.recent[i] = 0;
    }
    tally.since = 0;
}

}  // namespace tempo::TEMPO_ISA
