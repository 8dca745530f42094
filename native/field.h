// Residues mod p, and exact sums of rows of integers with secret vectors of residues: see src/tempo/verify/field.py.
#pragma once

#include "shares_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

typedef uint32_t Unsigned __attribute__((vector_size(kLanes * 4)));
typedef uint64_t Wide __attribute__((vector_size(kLanes * 4)));

constexpr uint64_t kPrime = (uint64_t(1) << 32) - 5;
constexpr int32_t kHalf = int32_t((kPrime - 1) / 2);

// `v` is a sum or difference mod 2^32. Where `overflow` is negative it left the range of int32 and came back by 2^32 at
// its other end: mod p that is by 5.
inline Integers corrected(Integers v, Integers overflow) {
    const Integers negative = v >> 31;
    return v + ((overflow >> 31) & ((negative ^ -5) - negative));
}

// Any integers in, integers of the same residue out, not reduced.
inline Integers add_mod(Integers a, Integers b) {
    const Integers sum = (Integers)((Unsigned)a + (Unsigned)b);
    return corrected(sum, (a ^ sum) & (b ^ sum));
}
inline Integers subtract_mod(Integers a, Integers b) {
    const Integers difference = (Integers)((Unsigned)a - (Unsigned)b);
    return corrected(difference, (a ^ b) & (a ^ difference));
}

inline Integers reduced(Integers v) {
    return (Integers)((Unsigned)v + ((Unsigned)(v > kHalf) & 5u) - ((Unsigned)(v < -kHalf) & 5u));
}

inline Wide load_wide(const uint32_t *from) {
    Wide v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// Of the lower halves.
inline Wide product(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// Products of two 32-bit numbers each, added up mod 2^64, and their upper halves: together the exact sum.
struct Total {
    Wide all, upper;
};

// An integer x is taken as x + 2^31, so that it has no sign: sums are too large by 2^31 times the sum of the vector.
constexpr uint32_t kOffset = uint32_t(1) << 31;

// Adds `K` totals of `count` integers, which stand at the start of whole vectors, the rest of the last one -kOffset.
// The vectors are `width` apart; a number that stands in the upper half of a lane is loaded from one further.
template <int K>
inline void add_products(const int32_t *integers, int64_t count, const uint32_t *vectors, int64_t width,
                         Total *totals) {
    Total total[K];
    for (int k = 0; k < K; ++k) total[k] = totals[k];
    for (int64_t i = 0; i < count; i += kLanes) {
        const Wide x = (Wide)((Unsigned)load_integers(integers + i) ^ kOffset);
        for (int k = 0; k < K; ++k) {
            const Wide even = product(x, load_wide(vectors + k * width + i));
            const Wide odd = product(x >> 32, load_wide(vectors + k * width + i + 1));
            total[k].all += even + odd;
            total[k].upper += (even >> 32) + (odd >> 32);
        }
    }
    for (int k = 0; k < K; ++k) totals[k] = total[k];
}

// Sums of one row after the other; what they are made of is given to `add` as it is made.
class RowSums {
  public:
    explicit RowSums(const FieldSums &sums) : s(sums), width(packed_width(sums.columns)) {
        for (int k = 0; k < s.vectors; ++k) {
            Wide sum{};
            for (int64_t i = 0; i < width; i += kLanes) {
                const Integers v = load_some(s.v + k * s.columns + i, s.columns - i);
                const Unsigned positive = (Unsigned)v - ((Unsigned)(v < 0) & 5u);
                std::memcpy(s.packed + k * width + i, &positive, sizeof positive);
                sum += ((Wide)positive >> 32) + ((Wide)positive & 0xffffffff);
            }
            excess[k] = total(sum) % kPrime * kOffset % kPrime;
            totals[k] = Total{};
        }
    }

    bool wanted() const { return s.vectors > 0; }

    // The integers of a row from `column` on; there is room for a whole vector more, which is used.
    void add(int32_t *integers, int64_t column, int64_t count) {
        for (int64_t i = count; i % kLanes; ++i) integers[i] = INT32_MIN;
        int k = 0;
        for (; k + 2 <= s.vectors; k += 2)
            add_products<2>(integers, count, s.packed + k * width + column, width, totals + k);
        if (k < s.vectors) add_products<1>(integers, count, s.packed + k * width + column, width, totals + k);
    }

    void finish(int64_t row) {
        for (int k = 0; k < s.vectors; ++k) {
            const uint64_t all = total(totals[k].all), upper = total(totals[k].upper);
            const uint64_t lower = all - (upper << 32);
            const uint64_t sum = (upper % kPrime * 5 + lower % kPrime + kPrime - excess[k]) % kPrime;
            s.sums[row * s.vectors + k] = int64_t(sum) - (sum > uint64_t(kHalf) ? int64_t(kPrime) : 0);
            totals[k] = Total{};
        }
    }

  private:
    static uint64_t total(Wide lanes) {
        uint64_t sum = 0;
        for (int lane = 0; lane < kLanes / 2; ++lane) sum += lanes[lane];
        return sum;
    }

    const FieldSums &s;
    int64_t width;
    uint64_t excess[kMostFieldVectors];
    Total totals[kMostFieldVectors];
};

inline void sum_rows(const FieldRows &r) {
    RowSums sums(r.sums);
    for (int64_t row = 0; row < r.rows; ++row) {
        for (int64_t column = 0; column < r.sums.columns; column += kAhead) {
            const int64_t left = r.sums.columns - column, count = left < kAhead ? left : kAhead;
            std::memcpy(r.integers, r.x.data + row * r.x.stride + column, size_t(count) * sizeof *r.integers);
            sums.add(r.integers, column, count);
        }
        sums.finish(row);
    }
}

}  // namespace tempo::TEMPO_ISA
