// Which rows or columns are zero throughout. What is live is left at its first number that is not, so that little is read.
#pragma once

#include "simd.h"
#include "zeros_types.h"

namespace tempo::TEMPO_ISA {

constexpr int64_t kAhead = 16;  // rows: they are too far apart for the processor to fetch the next one
constexpr int64_t kLook = 64;   // bytes looked at together

// Zero without its sign: of a number that is zero, whichever. Numbers too small to be normal are not.
template <typename T>
inline T magnitude(T bits) {
    return T(bits << 1);
}

// Whether so many elements are all zero; fast where they lie side by side.
template <typename T>
inline bool line_is_zero(const T *x, int64_t count, int64_t stride) {
    constexpr int kCount = kLook / int(sizeof(T));
    int64_t i = 0;
    for (; stride == 1 && i + kCount <= count; i += kCount) {
        T found = 0;
        for (int k = 0; k < kCount; ++k) found |= magnitude(x[i + k]);
        if (found) return false;
    }
    for (; i < count; ++i)
        if (magnitude(x[i * stride])) return false;
    return true;
}

template <typename T>
inline bool row_is_zero(const T *x, const Zeros &z) {
    for (int64_t position = 0; position < z.positions; ++position, x += z.position_stride)
        if (!line_is_zero(x, z.columns, z.column_stride)) return false;
    return true;
}

template <typename T>
void find_dead_rows(const Zeros &z, bool *dead) {
    const T *x = static_cast<const T *>(z.x);
    for (int64_t row = 0; row < z.rows; ++row, x += z.row_stride) {
        __builtin_prefetch(x + kAhead * z.row_stride);
        dead[row] = row_is_zero(x, z);
    }
}

// Columns that have been zero so far are looked at in the next row, and are fewer every time.
template <typename T>
void find_dead_columns(const Zeros &z, bool *dead, int32_t *candidates) {
    int64_t left = z.columns;
    for (int64_t i = 0; i < left; ++i) candidates[i] = int32_t(i), dead[i] = false;
    for (int64_t row = 0; row < z.rows && left; ++row)
        for (int64_t position = 0; position < z.positions && left; ++position) {
            const T *x = static_cast<const T *>(z.x) + row * z.row_stride + position * z.position_stride;
            int64_t kept = 0;
            for (int64_t i = 0; i < left; ++i) {
                const int32_t column = candidates[i];
                candidates[kept] = column;
                kept += magnitude(x[column * z.column_stride]) == 0;
            }
            left = kept;
        }
    for (int64_t i = 0; i < left; ++i) dead[candidates[i]] = true;
}

inline void dead_rows(const Zeros &z, bool *dead) {
    if (z.bytes == 2) return find_dead_rows<uint16_t>(z, dead);
    z.bytes == 4 ? find_dead_rows<uint32_t>(z, dead) : find_dead_rows<uint64_t>(z, dead);
}

inline void dead_columns(const Zeros &z, bool *dead, int32_t *candidates) {
    if (z.bytes == 2) return find_dead_columns<uint16_t>(z, dead, candidates);
    z.bytes == 4 ? find_dead_columns<uint32_t>(z, dead, candidates) : find_dead_columns<uint64_t>(z, dead, candidates);
}

}  // namespace tempo::TEMPO_ISA
