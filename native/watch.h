// Sums of the rows of what a sandwich reads, made of its own copy in the caches: what was summed is what is used.
#pragma once

#include "sandwich_types.h"
#include "sums.h"

namespace tempo::TEMPO_ISA {

constexpr int kWatchedAtOnce = 64;  // columns that one sum in float runs over

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

// Of a chunk of rows, `stride` apart: adds to totals[row][k], a vector each. `packed` as `pack` in sums.h gives it.
template <int K>
inline void watch_chunk(const float *chunk, int rows, int stride, int width, const float *packed, float *totals) {
    for (int row = 0; row < rows; ++row, chunk += stride, totals += (K + 1) * kLanes) {
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
    for (int k = 0; k < watch.vectors; ++k) watch.sums[k * rows + row] = totals[k * stride];
    const float square = totals[watch.vectors * stride];
    watch.lengths[row] = __builtin_sqrt(double(square));
    watch.finite = watch.finite && square < kMostSquare;  // false for what is not a number
    if (square > watch.longest) watch.longest = square;
}

}  // namespace tempo::TEMPO_ISA
