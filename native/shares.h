// Shares of rows, and rows of the products of shares: see src/tempo/schemes/fixed_point.py. Rows are rounded once, and
// answers read once, into the first-level cache. All else is made of that: what is summed is what is sent, or used.
#pragma once

#include "field.h"
#include "haar.h"
#include "keystream.h"
#include "low_rank.h"
#include "sums.h"

namespace tempo::TEMPO_ISA {

// Of a matrix of 32-bit numbers.
inline bool worth_streaming(const void *to, int64_t rows, int64_t columns, int64_t stride) {
    return rows * columns >= kStreamFrom && aligned(to) && stride % kLanes == 0;
}

#if defined(__AES__)

// To the nearest integer, ties to even.
inline Integers rounded(Vector v) {
#if defined(__AVX512F__)
    return (Integers)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v);
#else
    return (Integers)_mm256_cvtps_epi32((__m256)v);
#endif
}

template <typename T>
inline Vector scaled(const T *x, const float *scales, int64_t column, int64_t columns) {
    const Vector v = load_some(x + column, columns - column);
    return scales ? v * load_some(scales + column, columns - column) : v;
}

#if defined(__AVX512F__)
inline Reals lower_half(Vector v) { return (Reals)_mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256((__m512)v)); }
inline Reals upper_half(Vector v) {
    return (Reals)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
}
#else
inline Reals lower_half(Vector v) { return (Reals)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)); }
inline Reals upper_half(Vector v) { return (Reals)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)); }
#endif

template <typename T>
double norm(const T *x, const float *scales, int64_t columns) {
    Reals lower{}, upper{};
    for (int64_t column = 0; column < columns; column += kLanes) {
        const Vector v = scaled(x, scales, column, columns);
        const Reals low = lower_half(v), high = upper_half(v);
        lower += low * low;
        upper += high * high;
    }
    double sum = 0;
    for (int lane = 0; lane < kDoubles; ++lane) sum += lower[lane] + upper[lane];
    return __builtin_sqrt(sum);
}

// Words of all shares for the elements from `first` to `end`.
struct Ahead {
    int64_t first, end;
};

// Those from `element` on, up to `last`.
inline Ahead expand_ahead(const Shares &s, const Schedule *keys, int64_t element, int64_t last) {
    const int64_t first = element / kBlockWords * kBlockWords;
    int64_t count = (last - first + kBatchWords - 1) / kBatchWords * kBatchWords;
    if (count > kAhead) count = kAhead;
    const int64_t end = first + count < last ? first + count : last;
    for (int seed = 0; seed < s.seeds; ++seed) {
        int32_t *words = s.words + seed * kAhead;
        if (keystream(keys[seed], first / kBlockWords, kHalf, words, count))
            // Not zeros: what would be left of an element is the element, for a worker to read while it is written.
            refuse(s.refusals, seed, element, kHalf, words + (element - first), end - element, keys + seed);
    }
    return {first, end};
}

// Rounds `count` elements of a row in `step`s, keeps them as `integers`, and writes what shares leave of them.
// Of `kSeeds` seeds, or where it is zero, any number.
template <int kSeeds, typename T>
inline void share_some(const Shares &s, const T *x, const float *scales, float step, const int32_t *words,
                       bool past_caches, int32_t *integers, int32_t *out, int64_t count) {
    const int seeds = kSeeds ? kSeeds : s.seeds;
    for (int64_t i = 0; i < count; i += kLanes) {
        __builtin_prefetch(x + s.stride + i);  // of the next row, which is read for its norm first
        const Integers integer = rounded(scaled(x, scales, i, count) / step);
        store_integers(integers + i, integer);
        Integers left = integer;
        for (int seed = 0; seed < seeds; ++seed) left = subtract_mod(left, load_integers(words + seed * kAhead + i));
        left = reduced(left);
        if (i + kLanes > count)
            std::memcpy(out + i, &left, size_t(count - i) * sizeof *out);
        else
            put(reinterpret_cast<float *>(out + i), (Vector)left, past_caches);
    }
}

template <typename T>
void share_rows(const Shares &s) {
    Schedule keys[kMostSeeds];
    for (int seed = 0; seed < s.seeds; ++seed) keys[seed] = schedule(s.seed + seed * kSeedBytes);
    RowSums sums(s.sums);
    int32_t *integers = s.words + s.seeds * kAhead;
    const bool past_caches = worth_streaming(s.out, s.rows, s.columns, s.columns);
    const int64_t last = s.first + s.rows * s.columns;
    Ahead ahead{s.first, s.first};
    int64_t element = s.first;
    for (int64_t row = 0; row < s.rows; ++row) {
        const T *x = static_cast<const T *>(s.x) + row * s.stride;
        float step = float(norm(x, s.scales, s.columns) * s.ratio);
        if (step < s.least_step) step = s.least_step;
        s.steps[row] = step;
        for (int64_t column = 0; column < s.columns;) {
            if (element == ahead.end) ahead = expand_ahead(s, keys, element, last);
            int64_t count = ahead.end - element;
            if (count > s.columns - column) count = s.columns - column;
            const auto some = s.seeds == 1 ? share_some<1, T> : s.seeds == 2 ? share_some<2, T> : share_some<0, T>;
            some(s, x + column, s.scales ? s.scales + column : nullptr, step, s.words + (element - ahead.first),
                 past_caches, integers, s.out + (element - s.first), count);
            if (sums.wanted()) sums.add(integers, column, count);
            column += count, element += count;
        }
        sums.finish(row);
    }
    fence();
}

inline void share(const Shares &s) { s.half ? share_rows<uint16_t>(s) : share_rows<float>(s); }

#endif

// What is computed with `v` next is not fused with what made it: PyTorch rounds in between. (Generic code for x86 fuses
// nothing; elsewhere a bias may be added with one rounding less.)
inline Vector apart(Vector v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX2__)
    asm("" : "+x"(v));
#endif
    return v;
}

// `count` columns of a row that begin at `parts`; `integers` keeps what was read.
// Of `kParts` parts, or where it is zero, any number.
template <int kParts, typename T>
inline void combine_some(const int32_t *const *parts, int part_count, float step, const float *scales,
                         const float *bias, bool past_caches, int32_t *integers, T *out, int64_t count) {
    const int number = kParts ? kParts : part_count;
    const auto combined = [&](int64_t i) {
        Integers total = load_some(parts[0] + i, count - i);
        for (int p = 1; p < number; ++p) total = add_mod(total, load_some(parts[p] + i, count - i));
        total = reduced(total);
        store_integers(integers + i, total);
        Vector v = __builtin_convertvector(total, Vector) * step;
        if (scales) v *= load_some(scales + i, count - i);
        return bias ? apart(v) + load_some(bias + i, count - i) : v;
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put(out + i, combined(i), past_caches);
    if (i == count) return;
    const Vector last = combined(i);
    for (int64_t lane = 0; i + lane < count; ++lane) narrow(last[lane], out + i + lane);
}

template <typename T>
inline void combine_row(const Combination &c, const Output &to, int64_t row, int64_t start, const float *bias,
                        RowSums &sums) {
    const bool past_caches = !to.half && worth_streaming(to.data, c.rows, to.columns, to.stride);
    const int number = c.part_count;
    const auto some = number == 2 ? combine_some<2, T> : number == 3 ? combine_some<3, T> : combine_some<0, T>;
    for (int64_t place = 0; place < to.columns; place += kAhead) {
        const int64_t column = start + place, count = to.columns - place < kAhead ? to.columns - place : kAhead;
        const int32_t *parts[kMostParts];
        for (int p = 0; p < number; ++p) parts[p] = c.parts[p].data + row * c.parts[p].stride + column;
        some(parts, number, c.steps[row], c.scales ? c.scales + column : nullptr,
             bias ? bias + place : nullptr, past_caches, c.integers,
             static_cast<T *>(to.data) + row * to.stride + place, count);
        if (sums.wanted()) sums.add(c.integers, column, count);
    }
}

inline void combine(const Combination &c) {
    RowSums sums(c.sums);
    for (int64_t row = 0; row < c.rows; ++row) {
        const int place = int(row % kLowRankRows);
        int64_t start = 0;
        float *added = c.added;
        for (int o = 0; o < c.out_count; start += c.outs[o++].columns) {
            const Output &to = c.outs[o];
            const float *bias = to.bias;
            if (to.added.rank) {
                const int64_t stride = added_stride(to), left = c.rows - row;
                if (!place)
                    low_rank_rows(to.added, to.bias, row, left < kLowRankRows ? int(left) : kLowRankRows, to.columns,
                                added, stride);
                bias = added + place * stride;
                added += kLowRankRows * stride;
            }
            if (to.half)
                combine_row<uint16_t>(c, to, row, start, bias, sums);
            else
                combine_row<float>(c, to, row, start, bias, sums);
        }
        sums.finish(row);
    }
    fence();
}

}  // namespace tempo::TEMPO_ISA
