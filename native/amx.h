// Products of matrices of floats by AMX, which multiplies bfloat16 and adds up in float32.
//
// A float is the sum of three bfloat16 numbers, to its last bit: x = x1 + x2 + x3, each eight bits of it. So a product is
// x1 y1 + (x1 y2 + x2 y1) + (x1 y3 + x2 y2 + x3 y1), and what is left out lies below a float's own rounding. That is six
// times the multiplications, each sixteen times as fast as those of AVX-512.
//
// Sums run in another order than a loop's. Numbers that round to infinity as bfloat16, infinities and NaN are not
// split: whoever multiplies asks `splits` first. Numbers below 2^-110 lose digits: AMX takes what is subnormal for zero.
#pragma once

#include <type_traits>

#include "simd.h"

namespace tempo::TEMPO_ISA {

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

constexpr int64_t kSide = 16;   // rows of a tile; each is 16 pairs of bfloat16
constexpr int64_t kDepth = 32;  // that one instruction adds up over
constexpr int kParts = 3;
constexpr int64_t kTile = kSide * 16;  // pairs
constexpr int64_t kSplit = kParts * kTile;

inline int64_t tiles(int64_t n) { return (n + kSide - 1) / kSide; }
inline int64_t steps(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

// Whether all of (rows × columns) floats can be split; `columns` is a multiple of kLanes.
inline bool splits(const float *x, int64_t stride, int64_t rows, int64_t columns) {
    Bits most{};
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; j += kLanes) {
            const Bits size = (Bits)load(x + i * stride + j) & 0x7fffffffu;
            most = size > most ? size : most;
        }
    return _mm512_reduce_max_epu32((__m512i)most) < 0x7f7f8000u;
}

struct Split {
    Bits part[kParts];  // in the upper halves
};

inline Split split(Vector x) {
    const auto nearest = [](Vector v) { return ((Bits)v + 0x8000u) & 0xffff0000u; };
    const Bits first = nearest(x);
    const Vector left = x - (Vector)first;
    const Bits second = nearest(left);
    return {{first, second, (Bits)(left - (Vector)second)}};
}

// Rows of pairs, one of each part's tile: lane i is (a[i], b[i]).
inline void store_pairs(uint32_t *to, const Split &a, const Split &b) {
    for (int p = 0; p < kParts; ++p)
        _mm512_store_si512(to + p * kTile,
                           _mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(a.part[p] >> 16), (__m512i)b.part[p]));
}

// An operand: for every 16 rows of a left one, or columns of a right one, and every 32 of its depth, a tile of each
// part. Which of the 32 are a pair is the same for both: i and i + 16.
struct Tiles {
    uint32_t *data;
    int64_t depth;  // steps that there is room for

    uint32_t *at(int64_t tile, int64_t step) const { return data + (tile * depth + step) * kSplit; }
};

// The 16 × 16 floats at x, zero from row `valid` on.
inline void load_block(const float *x, int64_t stride, int64_t valid, Vector (&v)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) v[i] = i < valid ? load(x + i * stride) : Vector{};
}

// Makes tiles of x (rows × columns, a multiple of 16 of these). `depth_in_rows` says that rows of x are what is added up
// over, `turned` that a tile's rows are x's columns. So the left operand x is packed <false, false>, its transpose
// <true, true>; the right operand x <true, false>, its transpose <false, true>.
template <bool depth_in_rows, bool turned>
inline void pack(const float *x, int64_t stride, int64_t rows, int64_t columns, Tiles to) {
    const int64_t deep = depth_in_rows ? rows : columns, wide = depth_in_rows ? columns : rows;
    for (int64_t t = 0; t < tiles(wide); ++t)
        for (int64_t k = 0; k < steps(deep); ++k) {
            const float *block[2];
            int64_t valid[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t across = t * kSide, along = k * kDepth + half * kSide;
                const int64_t row = depth_in_rows ? along : across, column = depth_in_rows ? across : along;
                block[half] = x + row * stride + column;
                valid[half] = column < columns ? rows - row : 0;
            }
            Vector a[kLanes], b[kLanes];
            load_block(block[0], stride, valid[0], a);
            load_block(block[1], stride, valid[1], b);
            if (turned) transpose(a), transpose(b);
            for (int i = 0; i < kLanes; ++i) store_pairs(to.at(t, k) + i * 16, split(a[i]), split(b[i]));
        }
}

// Registers: 0 to 3 hold sums, 4 and 5 the left operand, 6 and 7 the right one.
template <int r>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(r));
}
template <int r>
inline void tile_load(const void *from, int64_t bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(r) : "memory");
}
template <int r>
inline void tile_store(void *to, int64_t bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(r) : "memory");
}
template <int sum, int a, int b>
inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// Whole tiles in all registers of this thread, until it is destroyed.
struct TileRegisters {
    TileRegisters() {
        struct {
            uint8_t palette = 1, rest[15]{};
            uint16_t row_bytes[16]{};
            uint8_t rows[16]{};
        } layout;
        for (int i = 0; i < 8; ++i) layout.row_bytes[i] = 64, layout.rows[i] = kSide;
        asm volatile("ldtilecfg %0" ::"m"(layout));
    }
    ~TileRegisters() { asm volatile("tilerelease"); }
};

template <int n, typename F>
inline void unroll(const F &f) {
    if constexpr (n > 0) {
        unroll<n - 1>(f);
        f(std::integral_constant<int, n - 1>{});
    }
}

// What is four sums at most.
template <int rows, int columns, typename F>
inline void multiply_tiles(Tiles a, int64_t i, Tiles b, int64_t j, int64_t depth, float *out, int64_t stride, bool add,
                           const F &between) {
    const auto each = [&](const auto &f) {
        unroll<rows>([&](auto r) { unroll<columns>([&](auto c) { f(r, c); }); });
    };
    const auto at = [&](int r, int c) { return out + r * kSide * stride + c * kSide; };
    const int64_t bytes = stride * int64_t(sizeof(float));
    each([&](auto r, auto c) {
        if (add)
            tile_load<r * columns + c>(at(r, c), bytes);
        else
            tile_zero<r * columns + c>();
    });
    for (int64_t k = 0; k < depth; ++k, between())
        unroll<kParts>([&](auto p) {
            unroll<rows>([&](auto r) { tile_load<4 + r>(a.at(i + r, k) + p * kTile, 64); });
            unroll<kParts - p>([&](auto q) {
                unroll<columns>([&](auto c) {
                    tile_load<6 + c % 2>(b.at(j + c, k) + q * kTile, 64);
                    unroll<rows>([&](auto r) { tile_multiply<r * columns + c, 4 + r, 6 + c % 2>(); });
                });
            });
        });
    each([&](auto r, auto c) { tile_store<r * columns + c>(at(r, c), bytes); });
}

// out = a · b, or out += a · b, in whole tiles: rows and columns of `out` in tiles, the depth in steps. Calls between()
// now and then, when tiles keep the processor waiting.
template <typename F>
inline void multiply_tiles(Tiles a, int64_t rows, Tiles b, int64_t columns, int64_t depth, float *out, int64_t stride,
                           bool add, const F &between) {
    const auto at = [=](int64_t i, int64_t j) { return out + i * kSide * stride + j * kSide; };
    for (int64_t j = 0; j < columns; j += 2) {
        const bool two = j + 1 < columns;
        int64_t i = 0;
        for (; i + 1 < rows; i += 2)
            two ? multiply_tiles<2, 2>(a, i, b, j, depth, at(i, j), stride, add, between)
                : multiply_tiles<2, 1>(a, i, b, j, depth, at(i, j), stride, add, between);
        if (i < rows)
            two ? multiply_tiles<1, 2>(a, i, b, j, depth, at(i, j), stride, add, between)
                : multiply_tiles<1, 1>(a, i, b, j, depth, at(i, j), stride, add, between);
    }
}

}  // namespace tempo::TEMPO_ISA
