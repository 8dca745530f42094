// A convolution's patches, whose taps come after channels, and back: lines of pixels are interleaved in the first-level
// cache.
#pragma once

#include <type_traits>

#include "patches_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

constexpr int kInterleaved = 64;  // interleaved at a time, so that all lines of a patch stay in the first-level cache

// Calls `f` with how many taps there are: at compile time, if that is usual.
template <typename F>
inline void with_taps(int64_t taps, const F &f) {
    if (taps == 9) return f(std::integral_constant<int, 9>{});
    f(std::integral_constant<int, 0>{});
}

inline void make_patches(const Patches &p, const float *maps, float *patches) {
    constexpr int kTaps = 32;  // at a time
    const float zeros[kInterleaved] = {};
    with_taps(p.taps, [&](auto known) {
        const int64_t taps = decltype(known)::value ? decltype(known)::value : p.taps;
        for (int64_t image = 0; image < p.images; ++image, maps += p.inputs * p.channels)
            for (int64_t output = 0; output < p.outputs; ++output, patches += p.channels * taps) {
                const int32_t *met = p.met + output * taps;
                for (int64_t first = 0; first < p.channels; first += kInterleaved) {
                    const int64_t count = p.channels - first < kInterleaved ? p.channels - first : kInterleaved;
                    for (int64_t done = 0; done < taps; done += kTaps) {
                        const int64_t some = taps - done < kTaps ? taps - done : kTaps;
                        const float *from[kTaps];
                        for (int64_t i = 0; i < some; ++i)
                            from[i] = met[done + i] < 0 ? zeros : maps + met[done + i] * p.channels + first;
                        float *to = patches + first * taps + done;
                        for (int64_t channel = 0; channel < count; ++channel, to += taps)
                            for (int64_t i = 0; i < some; ++i) to[i] = from[i][channel];
                    }
                }
            }
    });
}

// Adds to `maps`.
inline void add_patches(const Patches &p, const float *patches, float *maps) {
    with_taps(p.taps, [&](auto known) {
        const int64_t taps = decltype(known)::value ? decltype(known)::value : p.taps;
        for (int64_t image = 0; image < p.images; ++image, maps += p.inputs * p.channels)
            for (int64_t output = 0; output < p.outputs; ++output, patches += p.channels * taps) {
                const int32_t *met = p.met + output * taps;
                for (int64_t first = 0; first < p.channels; first += kInterleaved) {
                    const int64_t count = p.channels - first < kInterleaved ? p.channels - first : kInterleaved;
                    const float *from = patches + first * taps;
                    for (int64_t tap = 0; tap < taps; ++tap) {
                        if (met[tap] < 0) continue;
                        float *to = maps + met[tap] * p.channels + first;
                        for (int64_t channel = 0; channel < count; ++channel) to[channel] += from[channel * taps + tap];
                    }
                }
            }
    });
}

}  // namespace tempo::TEMPO_ISA
