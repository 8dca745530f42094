// Rotary position embedding, in one pass: pairs of features turned by the angles of their token.
#pragma once

#include "attention.h"
#include "layers_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

template <bool back>
void rotate_as(const Rotation &a) {
    const int64_t half = a.width / 2;
    for (int64_t n = 0; n < a.samples; ++n)
        for (int64_t t = 0; t < a.tokens; ++t) {
            const float *cos = a.cos + n * a.sample + t * a.width, *sin = a.sin + n * a.sample + t * a.width;
            for (int64_t h = 0; h < a.heads; ++h) {
                const float *x = at(a.x, n, h, t);
                float *out = at(a.out, n, h, t);
                for (int64_t i = 0; i < half; i += kLanes) {
                    const Vector low = load(x + i), high = load(x + half + i);
                    const Vector sin_low = load(sin + i), sin_high = load(sin + half + i);
                    store(out + i, low * load(cos + i) + (back ? high * sin_high : -(high * sin_low)));
                    store(out + half + i, high * load(cos + half + i) + (back ? -(low * sin_low) : low * sin_high));
                }
            }
        }
}

inline void rotate(const Rotation &a) { a.back ? rotate_as<true>(a) : rotate_as<false>(a); }

}  // namespace tempo::TEMPO_ISA
