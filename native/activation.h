// Activations y = x · s(x) with s a smooth step, alone and times another operand (SwiGLU, GeGLU), and their gradients.
#pragma once

#include "layers_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

// 2^v for v ≤ 126, to 2e-7 of its value; zero below -126. NaN stays NaN.
inline Vector power_of_two(Vector v) {
    const float round = 12582912.f;  // 1.5 · 2^23: adding it leaves an integer in the low bits
    const Vector shifted = v + round, f = v - (shifted - round);
    Vector p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    const Vector power = (Vector)(((Integers)shifted << 23) + (127 << 23));
    return v < -126.f ? Vector{} : p * power;
}

constexpr float kLog2e = 1.44269504088896341f;

// The step s(x) and its derivative.
struct Step {
    Vector value, slope;
};

// The normal distribution function: 1/2 + x p(x²) / q(x²), Eigen's quotient for erf(x / √2).
inline Vector normal(Vector x) {
    const Vector square = x * x * 0.5f;
    Vector p = square * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * square - 2.10102402082508e-06f;
    p = p * square - 5.69250639462346e-05f;
    p = p * square - 7.34990630326855e-04f;
    p = p * square - 2.95459980854025e-03f;
    p = p * square - 1.60960333262415e-02f;
    Vector q = square * -1.45660718464996e-05f - 2.13374055278905e-04f;
    q = q * square - 1.68282697438203e-03f;
    q = q * square - 7.37332916720468e-03f;
    q = q * square - 1.42647390514189e-02f;
    const Vector s = x * 0.353553390593273762f * p / q + 0.5f;
    const float one = 5.6f;  // from here on it is, to a float
    return x > one ? broadcast(1.f) : x < -one ? Vector{} : s;
}

// Its derivative.
inline Vector density(Vector x) { return power_of_two(x * x * (-0.5f * kLog2e)) * 0.398942280401432678f; }

inline Step logistic(Vector x) {
    const Vector v = x * -kLog2e;
    const Vector s = v > 126.f ? Vector{} : 1.f / (power_of_two(v) + 1.f);
    return {s, s * (1.f - s)};
}

template <Activation>
inline Step step(Vector x);

template <>
inline Step step<Activation::gelu>(Vector x) {
    return {normal(x), density(x)};
}

template <>
inline Step step<Activation::silu>(Vector x) {
    return logistic(x);
}

// (1 + tanh(u)) / 2 is the logistic function of 2u.
template <>
inline Step step<Activation::gelu_tanh>(Vector x) {
    const float two_k = 1.59576912160573071f, cubic = 0.044715f;
    const Vector square = x * x;
    const Step s = logistic(x * two_k * (square * cubic + 1.f));
    return {s.value, s.slope * two_k * (square * (3 * cubic) + 1.f)};
}

inline bool aligned_alike(const float *a, const float *b) {
    return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % (kLanes * sizeof(float)) == 0;
}

constexpr int64_t kCached = 1 << 18;  // more than so many elements go past the caches

template <bool streaming>
inline void put(float *to, Vector v) {
    if constexpr (streaming)
        stream(to, v);
    else
        store(to, v);
}

// Calls f(i, n) for every vector of n ≤ kLanes elements, of which the first may be short so that others are aligned.
template <typename F>
inline void for_vectors(const float *out, int64_t size, const F &f) {
    int64_t i = 0;
    const int64_t lead = (-(reinterpret_cast<uintptr_t>(out) / sizeof(float))) % kLanes;
    if (lead != 0 && lead <= size) f(0, i = lead);
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) f(i, kLanes), f(i + kLanes, kLanes);
    if (i + kLanes <= size) f(i, kLanes), i += kLanes;
    if (i < size) f(i, size - i);
}

inline Vector load_first(const float *from, int64_t n) {
    if (n == kLanes) return load(from);
    Vector v{};
    std::memcpy(&v, from, n * sizeof(float));
    return v;
}

template <bool streaming>
inline void put_first(float *to, Vector v, int64_t n) {
    if (n == kLanes)
        put<streaming>(to, v);
    else
        std::memcpy(to, &v, n * sizeof(float));
}

template <Activation kind, bool streaming>
void activate_as(const float *x, float *y, int64_t size) {
    for_vectors(y, size, [=](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vector v = load_first(x + i, n);
        put_first<streaming>(y + i, v * step<kind>(v).value, n);
    });
}

template <Activation kind, bool streaming>
void activation_gradient_as(const float *x, const float *g, float *dx, int64_t size) {
    for_vectors(dx, size, [=](int64_t i, int64_t n) {
        const Vector v = load_first(x + i, n);
        const Step s = step<kind>(v);
        put_first<streaming>(dx + i, load_first(g + i, n) * (v * s.slope + s.value), n);
    });
}

template <Activation kind>
void activation_as(const float *x, const float *g, float *out, int64_t size) {
    if (size > kCached && g == nullptr) {
        activate_as<kind, true>(x, out, size);
    } else if (size > kCached) {
        activation_gradient_as<kind, true>(x, g, out, size);
    } else if (g == nullptr) {
        activate_as<kind, false>(x, out, size);
    } else {
        activation_gradient_as<kind, false>(x, g, out, size);
    }
    fence();
}

// `out` is y where `g` is null, else dx.
inline void activation(Activation kind, const float *x, const float *g, float *out, int64_t size) {
    switch (kind) {
        case Activation::gelu: return activation_as<Activation::gelu>(x, g, out, size);
        case Activation::gelu_tanh: return activation_as<Activation::gelu_tanh>(x, g, out, size);
        case Activation::silu: return activation_as<Activation::silu>(x, g, out, size);
    }
}

template <Activation kind, bool streaming>
void gate_as(const float *x, const float *up, float *y, int64_t size) {
    for_vectors(y, size, [=](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vector v = load_first(x + i, n);
        put_first<streaming>(y + i, v * step<kind>(v).value * load_first(up + i, n), n);
    });
}

template <Activation kind, bool streaming>
void gate_gradient_as(const float *x, const float *up, const float *g, float *dx, float *dup, int64_t size) {
    for_vectors(dx, size, [=](int64_t i, int64_t n) __attribute__((always_inline)) {
        const Vector v = load_first(x + i, n), gradient = load_first(g + i, n);
        const Step s = step<kind>(v);
        put_first<streaming>(dx + i, gradient * load_first(up + i, n) * (v * s.slope + s.value), n);
        put_first<streaming>(dup + i, gradient * (v * s.value), n);
    });
}

template <Activation kind>
void gated_as(const float *x, const float *up, const float *g, float *out, float *dup, int64_t size) {
    const bool streaming = size > kCached && (g == nullptr || aligned_alike(out, dup));
    if (g == nullptr)
        streaming ? gate_as<kind, true>(x, up, out, size) : gate_as<kind, false>(x, up, out, size);
    else
        streaming ? gate_gradient_as<kind, true>(x, up, g, out, dup, size)
                  : gate_gradient_as<kind, false>(x, up, g, out, dup, size);
    fence();
}

// x · s(x) · up; `out` is that where `g` is null, else dx.
inline void gated(Activation kind, const float *x, const float *up, const float *g, float *out, float *dup,
                  int64_t size) {
    switch (kind) {
        case Activation::gelu: return gated_as<Activation::gelu>(x, up, g, out, dup, size);
        case Activation::gelu_tanh: return gated_as<Activation::gelu_tanh>(x, up, g, out, dup, size);
        case Activation::silu: return gated_as<Activation::silu>(x, up, g, out, dup, size);
    }
}

}  // namespace tempo::TEMPO_ISA
