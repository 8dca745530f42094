// A convolution's patches, whose taps come after channels, and back: lines of pixels are interleaved in the first-level
// cache.
#pragma once

#include <type_traits>

#include "patches_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

constexpr int kInterleaved = 64;  // interleaved at a time, so that all lines of a patch stay in the first-level cache

// Calls `f` for some channels of every patch, with how many taps there are (at compile time, if that is usual), the pixels
// that these meet, where the image and the patch have those channels, and how many they are.
template <typename F>
inline void for_channels(const Patches &p, const F &f) {
    const auto each = [&](auto taps) {
        for (int64_t image = 0; image < p.images; ++image)
            for (int64_t output = 0; output < p.outputs; ++output)
                for (int64_t first = 0; first < p.channels; first += kInterleaved)
                    f(taps, p.met + output * taps, image * p.inputs * p.channels + first,
                      ((image * p.outputs + output) * p.channels + first) * taps,
                      p.channels - first < kInterleaved ? p.channels - first : kInterleaved);
    };
    if (p.taps == 9) return each(std::integral_constant<int64_t, 9>{});
    each(p.taps);
}

inline void make_patches(const Patches &p, const float *maps, float *patches) {
    constexpr int kTaps = 32;  // at a time
    const float zeros[kInterleaved] = {};
    for_channels(p, [&](auto taps, const int32_t *met, int64_t in_image, int64_t in_patch, int64_t count) {
        for (int64_t done = 0; done < taps; done += kTaps) {
            const int64_t some = taps - done < kTaps ? taps - done : kTaps;
            const float *from[kTaps];
            for (int64_t i = 0; i < some; ++i)
                from[i] = met[done + i] < 0 ? zeros : maps + in_image + met[done + i] * p.channels;
            float *to = patches + in_patch + done;
            for (int64_t channel = 0; channel < count; ++channel, to += taps)
                for (int64_t i = 0; i < some; ++i) to[i] = from[i][channel];
        }
    });
}

// Adds to `maps`.
inline void add_patches(const Patches &p, const float *patches, float *maps) {
    for_channels(p, [&](auto taps, const int32_t *met, int64_t in_image, int64_t in_patch, int64_t count) {
        for (int64_t tap = 0; tap < taps; ++tap) {
            if (met[tap] < 0) continue;
            const float *from = patches + in_patch + tap;
            float *to = maps + in_image + met[tap] * p.channels;
            for (int64_t channel = 0; channel < count; ++channel) to[channel] += from[channel * taps];
        }
    });
}

}  // namespace tempo::TEMPO_ISA
