// Standard normal numbers of random words, by Box and Muller: see src/tempo/schemes/haar.py.
#pragma once

#include "simd.h"

namespace tempo::TEMPO_ISA {

constexpr int kDoubles = kLanes / 2;
typedef double Reals __attribute__((vector_size(kDoubles * 8)));
typedef int64_t Words __attribute__((vector_size(kDoubles * 8)));

template <typename V, typename T>
inline V load_as(const T *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename V, typename T>
inline void store_as(T *to, V v) {
    std::memcpy(to, &v, sizeof v);
}
inline Reals pick(Words which, Reals yes, Reals no) { return (Reals)((which & (Words)yes) | (~which & (Words)no)); }
inline Vector pick(Integers which, Vector yes, Vector no) {
    return (Vector)((which & (Integers)yes) | (~which & (Integers)no));
}

inline Reals root(Reals v) {
#if defined(__AVX512F__)
    return (Reals)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
    return (Reals)_mm256_sqrt_pd((__m256d)v);
#else
    for (int i = 0; i < kDoubles; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
#endif
}
inline Vector root(Vector v) {
#if defined(__AVX512F__)
    return (Vector)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
    return (Vector)_mm256_sqrt_ps((__m256)v);
#else
    for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

// --- in double: 64 bits make a number ---

// Of normal numbers in (0, 1). log x = e log 2 + 2 artanh((m - 1) / (m + 1)), where m is within √½ and √2.
inline Reals logarithm(Reals x) {
    const Words bits = (Words)x;
    Reals m = (Reals)((bits & 0x000fffffffffffff) | 0x3ff0000000000000);
    // A small integer in the lowest bits of 2^52 is that much more than 2^52.
    Reals e = (Reals)((Words)((bits >> 52) & 0x7ff) | 0x4330000000000000) - (0x1p52 + 1023.0);
    const Words large = (Words)(m > 1.4142135623730951);
    m = pick(large, m * 0.5, m);
    e = pick(large, e + 1.0, e);
    const Reals s = (m - 1.0) / (m + 1.0), z = s * s;
    Reals series = 1.0 / 23 - Reals{};
    for (int n = 21; n >= 3; n -= 2) series = series * z + 1.0 / n;
    // log 2 in two parts: multiples of the first are exact.
    return e * 0x1.62e42fefa38p-1 + (2.0 * s + (2.0 * s * z * series + e * 0x1.ef35793c7673p-45));
}

// cos and sin of 2π u for u in (0, 1), by Taylor's series within an eighth of a turn of the nearest quarter.
inline void turn(Reals u, Reals &cosine, Reals &sine) {
    const Reals magic = 0x1.8p52 - Reals{};  // adding it rounds to an integer, which is then in the lowest bits
    const Reals rounded = u * 4.0 + magic;
    const Words quarter = (Words)rounded;
    const Reals t = (u - (rounded - magic) * 0.25) * 6.283185307179586, z = t * t;
    Reals s = 1.0 / 355687428096000.0 - Reals{}, c = 1.0 / 20922789888000.0 - Reals{};
    s = s * z - 1.0 / 1307674368000.0, c = c * z - 1.0 / 87178291200.0;
    s = s * z + 1.0 / 6227020800.0, c = c * z + 1.0 / 479001600.0;
    s = s * z - 1.0 / 39916800.0, c = c * z - 1.0 / 3628800.0;
    s = s * z + 1.0 / 362880.0, c = c * z + 1.0 / 40320.0;
    s = s * z - 1.0 / 5040.0, c = c * z - 1.0 / 720.0;
    s = s * z + 1.0 / 120.0, c = c * z + 1.0 / 24.0;
    s = s * z - 1.0 / 6.0, c = c * z - 0.5;
    s = t + t * z * s, c = 1.0 + z * c;
    const Words odd = -(quarter & 1), negative = (quarter & 2) << 62;
    cosine = (Reals)((Words)pick(odd, s, c) ^ negative ^ (odd & INT64_MIN));
    sine = (Reals)((Words)pick(odd, c, s) ^ negative);
}

inline void box_muller(Words of_radius, Words of_angle, Reals &first, Reals &second) {
    const auto uniform = [](Words bits) {
        return 2.0 - (Reals)(((bits >> 12) & 0x000fffffffffffff) | 0x3ff0000000000001);
    };
    const Reals radius = root(-2.0 * logarithm(uniform(of_radius)));
    turn(uniform(of_angle), second, first);
    first *= radius, second *= radius;
}

// --- in float: 32 bits ---

// Of u = (word + ½) / 2^32, as exact where u is next to one: 1 - u then stands for it. Series as above.
inline Vector logarithm(Integers word) {
    const Integers upper = word >> 31;  // all ones where u > ½
    const Vector t = (__builtin_convertvector(word ^ upper, Vector) + 0.5f) * 0x1p-32f;
    const Integers bits = (Integers)pick(upper, 1.0f - t, t);
    Integers e = (bits >> 23) - 127;
    Vector m = (Vector)((bits & 0x007fffff) | 0x3f800000);
    const Integers large = (Integers)(m > 1.41421356f);
    m = pick(large, m * 0.5f, m);
    e -= large;
    const Vector f = pick(upper & (Integers)(e == 0), -t, m - 1.0f);
    const Vector s = f / (2.0f + f), z = s * s;
    Vector series = 1.0f / 11 - Vector{};
    for (int n = 9; n >= 3; n -= 2) series = series * z + 1.0f / float(n);
    return __builtin_convertvector(e, Vector) * 0.693147181f + (2.0f * s + 2.0f * s * z * series);
}

// cos and sin of 2π u.
inline void turn(Integers word, Vector &cosine, Vector &sine) {
    const Integers quarter = (word + (1 << 29)) >> 30;
    const Vector t = (__builtin_convertvector(word - (quarter << 30), Vector) + 0.5f) * 1.46291808e-9f, z = t * t;
    Vector s = 1.0f / 362880.0f - Vector{}, c = 1.0f / 40320.0f - Vector{};
    s = s * z - 1.0f / 5040.0f, c = c * z - 1.0f / 720.0f;
    s = s * z + 1.0f / 120.0f, c = c * z + 1.0f / 24.0f;
    s = s * z - 1.0f / 6.0f, c = c * z - 0.5f;
    s = t + t * z * s, c = 1.0f + z * c;
    const Integers odd = -(quarter & 1), negative = (quarter & 2) << 30;
    cosine = (Vector)((Integers)pick(odd, s, c) ^ negative ^ (odd & INT32_MIN));
    sine = (Vector)((Integers)pick(odd, c, s) ^ negative);
}

inline void box_muller(Integers of_radius, Integers of_angle, Vector &first, Vector &second) {
    const Vector radius = root(-2.0f * logarithm(of_radius));
    turn(of_angle, second, first);
    first *= radius, second *= radius;
}

// --- both ---

template <typename V, typename Bits, typename Real>
inline void gaussians_as(Real *numbers, int64_t half) {
    constexpr int kTogether = sizeof(V) / sizeof(Real);
    const auto some = [](Real *radii, Real *angles) {
        V first, second;
        box_muller(load_as<Bits>(radii), load_as<Bits>(angles), first, second);
        store_as(radii, first);
        store_as(angles, second);
    };
    int64_t i = 0;
    for (; i + kTogether <= half; i += kTogether) some(numbers + i, numbers + half + i);
    if (i == half) return;
    const size_t left = size_t(half - i) * sizeof(Real);
    Real radii[kTogether] = {}, angles[kTogether] = {};
    std::memcpy(radii, numbers + i, left);
    std::memcpy(angles, numbers + half + i, left);
    some(radii, angles);
    std::memcpy(numbers + i, radii, left);
    std::memcpy(numbers + half + i, angles, left);
}

// 2 `half` random words become as many normal numbers, in place: all radii come first, then all angles.
inline void gaussians(double *numbers, int64_t half) { gaussians_as<Reals, Words>(numbers, half); }
inline void gaussians_single(float *numbers, int64_t half) { gaussians_as<Vector, Integers>(numbers, half); }

}  // namespace tempo::TEMPO_ISA
