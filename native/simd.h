// Vectors of floats of this instruction set's width, and the little that is done with them everywhere.
//
// Nothing compiled for one instruction set may be shared with others: the linker keeps one copy of an inline function,
// whichever it finds first. So all of it is in the set's own namespace, and templates of the standard library that
// could become functions (std::min, std::copy) are not used.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tempo::TEMPO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

// The compiler splits these where registers are shorter.
typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

inline int least(int a, int b) { return a < b ? a : b; }
inline int greatest(int a, int b) { return a < b ? b : a; }

inline Vector load(const float *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float *to, Vector v) { std::memcpy(to, &v, sizeof v); }

inline Integers load_integers(const int32_t *from) {
    Integers v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// Lanes from `valid` on are zero.
inline Integers load_some(const int32_t *from, int64_t valid) {
    if (valid >= kLanes) return load_integers(from);
    Integers v{};
    if (valid > 0) std::memcpy(&v, from, size_t(valid) * sizeof *from);
    return v;
}

inline void store_integers(int32_t *to, Integers v) { std::memcpy(to, &v, sizeof v); }

inline Vector broadcast(float value) { return value - Vector{}; }

// Past the caches, where `to` is aligned for it: for what is larger than they are, and not read again soon.
inline void stream(float *to, Vector v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)v);
#else
    store(to, v);
#endif
}

// Makes streamed stores visible in order; to be called once after the last.
inline void fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// bfloat16 is the upper half of a float; rounds to nearest, ties to even, as PyTorch does.
inline Vector load(const uint16_t *from) {
    typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
    Half half;
    std::memcpy(&half, from, sizeof half);
    Integers wide = __builtin_convertvector(half, Integers) << 16;
    return (Vector)wide;
}

inline void store(uint16_t *to, Vector v) {
    typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
    Integers bits = (Integers)v;
    Integers rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Integers nan = (Integers)(v != v);
    Half half = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Half);
    std::memcpy(to, &half, sizeof half);
}

// Elements of an output from which it is written past the caches: what a core's own hold. Those that it shares may be
// larger, but between two uses of a buffer a step fills them with others.
constexpr int64_t kStreamFrom = 1 << 19;

inline bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % (kLanes * 4) == 0; }

template <typename T>
inline void put(T *to, Vector v, bool) {
    store(to, v);
}
inline void put(float *to, Vector v, bool past_caches) {
    if (past_caches)
        stream(to, v);
    else
        store(to, v);
}

inline float widen(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float widen(float value) { return value; }

inline void narrow(float value, float *to) { *to = value; }
inline void narrow(float value, uint16_t *to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// In halves, within registers.
inline float sum(Vector v) {
#if defined(__AVX512F__)
    const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const Vector eight = v;
#endif
    const auto four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    const auto two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
    return two[0] + two[1];
}

// Rows become columns, in registers.
#if defined(__AVX512F__)
inline void transpose(Vector (&v)[16]) {
    Vector t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = (Vector)_mm512_maskz_unpacklo_ps(0xffff, (__m512)v[i], (__m512)v[i + 1]);
        t[i + 1] = (Vector)_mm512_maskz_unpackhi_ps(0xffff, (__m512)v[i], (__m512)v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        __m512d a = (__m512d)t[i], b = (__m512d)t[i + 1], c = (__m512d)t[i + 2], d = (__m512d)t[i + 3];
        v[i] = (Vector)_mm512_maskz_unpacklo_pd(0xff, a, c);
        v[i + 1] = (Vector)_mm512_maskz_unpackhi_pd(0xff, a, c);
        v[i + 2] = (Vector)_mm512_maskz_unpacklo_pd(0xff, b, d);
        v[i + 3] = (Vector)_mm512_maskz_unpackhi_pd(0xff, b, d);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)v[i], (__m512)v[i + 4], 0x88);
        t[i + 4] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)v[i], (__m512)v[i + 4], 0xdd);
        t[i + 8] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)v[i + 8], (__m512)v[i + 12], 0x88);
        t[i + 12] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)v[i + 8], (__m512)v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)t[i], (__m512)t[i + 8], 0x88);
        v[i + 4] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)t[i + 4], (__m512)t[i + 12], 0x88);
        v[i + 8] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)t[i], (__m512)t[i + 8], 0xdd);
        v[i + 12] = (Vector)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)t[i + 4], (__m512)t[i + 12], 0xdd);
    }
}
#elif defined(__AVX2__)
inline void transpose(Vector (&v)[8]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = (Vector)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        v[i + 4] = (Vector)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
#else
inline void transpose(Vector (&v)[8]) {
    float rows[8][8];
    std::memcpy(rows, v, sizeof rows);
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) v[i][j] = rows[j][i];
}
#endif

}  // namespace tempo::TEMPO_ISA
