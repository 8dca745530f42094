// BatchNorm over rows of channels, with a residual and ReLU on the way out, and its gradients.
#pragma once

#include "activation.h"
#include "layers_types.h"
#include "rms_norm.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

constexpr int64_t kChannels = 512;  // summed at a time: sums stay in the first-level cache

// Gradients pass where ReLU let its operand through, and where that is not a number.
inline Vector passed(Vector g, Vector operand) { return operand <= 0.f ? Vector{} : g; }

// With d = x - center, adds Σ u and Σ u · d of every channel, where u is what is summed.
template <Summed what, bool streaming>
void sum_channels_as(const ChannelSums &a) {
    float sums[2][kChannels];
    for (int64_t start = 0; start < a.rows; start += kSummed) {
        const int64_t end = a.rows - start < kSummed ? a.rows : start + kSummed;
        for (int64_t first = 0; first < a.width; first += kChannels) {
            const int64_t width = a.width - first < kChannels ? a.width - first : kChannels;
            std::memset(sums, 0, sizeof sums);
            for (int64_t row = start; row < end; ++row) {
                const int64_t at = row * a.width + first;
                for_row(width, [&](int64_t i, int64_t n, int) __attribute__((always_inline)) {
                    const Vector x = load_first(a.x + at + i, n), d = x - load_first(a.center + first + i, n);
                    Vector u = d;
                    if constexpr (what != Summed::inputs) u = load_first(a.g + at + i, n);
                    if constexpr (what == Summed::through_relu)
                        u = passed(u, x * load_first(a.scale + first + i, n) + load_first(a.shift + first + i, n));
                    if constexpr (what == Summed::through_relu_of_sum) {
                        u = passed(u, load_first(a.y + at + i, n));
                        put_first<streaming>(a.passed + at + i, u, n);
                    }
                    store(sums[0] + i, load(sums[0] + i) + u);
                    store(sums[1] + i, load(sums[1] + i) + u * d);
                });
            }
            for (int k = 0; k < 2; ++k)
                for (int64_t i = 0; i < width; ++i) a.sums[k * a.width + first + i] += double(sums[k][i]);
        }
    }
}

inline void sum_channels(const ChannelSums &a) {
    const bool streaming = a.rows * a.width > kCached && a.width % kLanes == 0 && aligned(a.passed);
    switch (a.what) {
        case Summed::inputs: return sum_channels_as<Summed::inputs, false>(a);
        case Summed::gradients: return sum_channels_as<Summed::gradients, false>(a);
        case Summed::through_relu: return sum_channels_as<Summed::through_relu, false>(a);
        case Summed::through_relu_of_sum:
            streaming ? sum_channels_as<Summed::through_relu_of_sum, true>(a)
                      : sum_channels_as<Summed::through_relu_of_sum, false>(a);
            fence();
    }
}

// x · scale + shift, plus a residual, through ReLU.
template <bool residual, bool relu, bool streaming>
void normalize_as(const Normalization &a) {
    for (int64_t row = 0; row < a.rows; ++row) {
        const int64_t at = row * a.width;
        for_row(a.width, [&](int64_t i, int64_t n, int) __attribute__((always_inline)) {
            Vector y = load_first(a.x + at + i, n) * load_first(a.scale + i, n) + load_first(a.shift + i, n);
            if constexpr (residual) y += load_first(a.residual + at + i, n);
            if constexpr (relu) y = passed(y, y);
            put_first<streaming>(a.out + at + i, y, n);
        });
    }
}

// (g - mean - (x - center) · slope) · scale, with g as it passed through ReLU; without what statistics of the `batch` add,
// g · scale.
template <bool relu, bool batch, bool streaming>
void normalize_gradient_as(const Normalization &a) {
    for (int64_t row = 0; row < a.rows; ++row) {
        const int64_t at = row * a.width;
        for_row(a.width, [&](int64_t i, int64_t n, int) __attribute__((always_inline)) {
            const Vector x = load_first(a.x + at + i, n), scale = load_first(a.scale + i, n);
            Vector g = load_first(a.g + at + i, n);
            if constexpr (relu) g = passed(g, x * scale + load_first(a.shift + i, n));
            if constexpr (batch) {
                const Vector d = x - load_first(a.center + i, n);
                g -= load_first(a.mean + i, n) + d * load_first(a.slope + i, n);
            }
            put_first<streaming>(a.out + at + i, g * scale, n);
        });
    }
}

template <bool streaming>
void normalize_to(const Normalization &a) {
    if (a.g != nullptr && a.mean != nullptr)
        a.relu ? normalize_gradient_as<true, true, streaming>(a) : normalize_gradient_as<false, true, streaming>(a);
    else if (a.g != nullptr)
        a.relu ? normalize_gradient_as<true, false, streaming>(a) : normalize_gradient_as<false, false, streaming>(a);
    else if (a.residual != nullptr)
        a.relu ? normalize_as<true, true, streaming>(a) : normalize_as<true, false, streaming>(a);
    else
        a.relu ? normalize_as<false, true, streaming>(a) : normalize_as<false, false, streaming>(a);
}

inline void normalize(const Normalization &a) {
    const bool streaming = a.rows * a.width > kCached && a.width % kLanes == 0 && aligned(a.out);
    streaming ? normalize_to<true>(a) : normalize_to<false>(a);
    fence();
}

}  // namespace tempo::TEMPO_ISA
