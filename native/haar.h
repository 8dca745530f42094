// Standard normal numbers, and Haar orthogonal matrices made of them: see src/tempo/schemes/haar.py. All in double.
#pragma once

#include "haar_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

constexpr int kDoubles = kLanes / 2;
typedef double Reals __attribute__((vector_size(kDoubles * 8)));
typedef int64_t Words __attribute__((vector_size(kDoubles * 8)));

inline Reals load_reals(const double *from) {
    Reals v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline void store_reals(double *to, Reals v) { std::memcpy(to, &v, sizeof v); }
inline Reals all(double value) { return value - Reals{}; }
inline Reals pick(Words which, Reals yes, Reals no) { return (Reals)((which & (Words)yes) | (~which & (Words)no)); }

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
    Reals series = all(1.0 / 23);
    for (int n = 21; n >= 3; n -= 2) series = series * z + 1.0 / n;
    // log 2 in two parts: multiples of the first are exact.
    return e * 0x1.62e42fefa38p-1 + (2.0 * s + (2.0 * s * z * series + e * 0x1.ef35793c7673p-45));
}

// cos and sin of 2π u for u in (0, 1), by Taylor's series within an eighth of a turn of the nearest quarter.
inline void turn(Reals u, Reals &cosine, Reals &sine) {
    const Reals magic = all(0x1.8p52);  // adding it rounds to an integer, which is then in the lowest bits
    const Reals rounded = u * 4.0 + magic;
    const Words quarter = (Words)rounded;
    const Reals t = (u - (rounded - magic) * 0.25) * 6.283185307179586, z = t * t;
    Reals s = all(1.0 / 355687428096000.0), c = all(1.0 / 20922789888000.0);
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

struct Pair {
    Reals first, second;
};

// Box and Muller: 2 `half` random 64-bit words become as many normal numbers, in place.
inline void gaussians(double *numbers, int64_t half) {
    const auto some = [&](int64_t i) {
        const auto uniform = [](Reals words) {
            const Words bits = (Words)words;
            return 2.0 - (Reals)(((bits >> 12) & 0x000fffffffffffff) | 0x3ff0000000000001);
        };
        const Reals radius = root(-2.0 * logarithm(uniform(load_reals(numbers + i))));
        Reals cosine, sine;
        turn(uniform(load_reals(numbers + half + i)), cosine, sine);
        return Pair{radius * sine, radius * cosine};
    };
    int64_t i = 0;
    for (; i + kDoubles <= half; i += kDoubles) {
        const auto [first, second] = some(i);
        store_reals(numbers + i, first);
        store_reals(numbers + half + i, second);
    }
    if (i == half) return;
    const int64_t left = half - i;
    double last[2 * kDoubles];
    for (int lane = 0; lane < kDoubles; ++lane) {
        last[lane] = numbers[lane < left ? i + lane : i];
        last[kDoubles + lane] = numbers[half + (lane < left ? i + lane : i)];
    }
    gaussians(last, kDoubles);
    for (int64_t lane = 0; lane < left; ++lane) {
        numbers[i + lane] = last[lane];
        numbers[half + i + lane] = last[kDoubles + lane];
    }
}

// `J` columns from `column` on, from row `k` down, are reflected: q -= tau v (vᵀ q).
template <int J>
inline void reflect(double *q, const double *v, Reals tau, int64_t side, int64_t k, int64_t column) {
    Reals dot[J] = {};
    for (int64_t i = k; i < side; ++i) {
        const Reals of_v = load_reals(v + i * kDoubles);
        for (int j = 0; j < J; ++j) dot[j] += of_v * load_reals(q + (i * side + column + j) * kDoubles);
    }
    for (int j = 0; j < J; ++j) dot[j] *= tau;
    for (int64_t i = k; i < side; ++i) {
        const Reals of_v = load_reals(v + i * kDoubles);
        for (int j = 0; j < J; ++j) {
            double *at = q + (i * side + column + j) * kDoubles;
            store_reals(at, load_reals(at) - of_v * dot[j]);
        }
    }
}

// Products of reflections, from the last one back, for as many matrices as there are lanes side by side.
inline void orthogonal(const Haar &h) {
    const int64_t side = h.side, triangle = side * (side + 1) / 2, square = side * side;
    double *q = h.memory, *v = q + square * kDoubles, *signs = v + side * kDoubles;
    for (int64_t block = 0; block < h.count; block += kDoubles) {
        const int64_t real = h.count - block < kDoubles ? h.count - block : kDoubles;
        for (int64_t i = 0; i < square; ++i) store_reals(q + i * kDoubles, Reals{});
        for (int64_t k = side - 1; k >= 0; --k) {
            const double *numbers = h.gaussians + block * triangle + k * side - k * (k - 1) / 2;
            Reals squares{};
            for (int64_t i = k; i < side; ++i) {
                double lanes[kDoubles];
                for (int64_t lane = 0; lane < kDoubles; ++lane)
                    lanes[lane] = numbers[(lane < real ? lane : 0) * triangle + i - k];
                const Reals x = load_reals(lanes);
                store_reals(v + i * kDoubles, x);
                squares += x * x;
            }
            const Reals first = load_reals(v + k * kDoubles), norm = root(squares);
            const Reals sign = pick((Words)(first < 0.0), all(-1.0), all(1.0));
            const Reals scale = 1.0 / (first + sign * norm), tau = 1.0 + sign * first / norm;
            store_reals(v + k * kDoubles, all(1.0));
            for (int64_t i = k + 1; i < side; ++i)
                store_reals(v + i * kDoubles, load_reals(v + i * kDoubles) * scale);
            store_reals(signs + k * kDoubles, -sign);
            store_reals(q + (k * side + k) * kDoubles, all(1.0));
            int64_t column = k;
            for (; column + 4 <= side; column += 4) reflect<4>(q, v, tau, side, k, column);
            for (; column < side; ++column) reflect<1>(q, v, tau, side, k, column);
        }
        for (int64_t i = 0; i < square; ++i) {
            double lanes[kDoubles];
            store_reals(lanes, load_reals(q + i * kDoubles) * load_reals(signs + i % side * kDoubles));
            for (int64_t lane = 0; lane < real; ++lane) h.q[(block + lane) * square + i] = lanes[lane];
        }
    }
}

}  // namespace tempo::TEMPO_ISA
