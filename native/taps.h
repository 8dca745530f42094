// Sums of the pixels that a convolution's kernel covers, with the vectors of its taps: a convolution with few channels on
// one side. Each tap's vectors are packed side by side, and serve a few pixels at a time.
#pragma once

#include "sums.h"

namespace tempo::TEMPO_ISA {

// Where `place` on this side meets the other side at `tap`; negative: nowhere.
inline int32_t met(const Taps &t, int axis, int64_t tap, int64_t place) {
    const int64_t shift = tap * t.dilation[axis] - t.padding[axis];
    int64_t other = t.back ? place - shift : place * t.stride[axis] + shift;
    if (t.back && other % t.stride[axis] != 0) return -1;
    if (t.back) other /= t.stride[axis];
    return other >= 0 && other < t.size[axis] ? int32_t(other) : -1;
}

// Of every pixel of an image and every tap, the pixel met there. Pixels that meet the same taps come one after the other.
inline void meet(const Taps &t) {
    const int64_t pixels = t.out[0] * t.out[1], step[2] = {t.back ? t.stride[0] : 1, t.back ? t.stride[1] : 1};
    int64_t at = 0;
    for (int64_t phase = 0; phase < step[0] * step[1]; ++phase)
        for (int64_t row = phase / step[1]; row < t.out[0]; row += step[0])
            for (int64_t column = phase % step[1]; column < t.out[1]; column += step[1]) {
                for (int64_t tap = 0; tap < t.taps[0] * t.taps[1]; ++tap) {
                    const int32_t y = met(t, 0, tap / t.taps[1], row), x = met(t, 1, tap % t.taps[1], column);
                    t.meets[tap * pixels + at] = y < 0 || x < 0 ? -1 : int32_t(y * t.size[1] + x);
                }
                t.order[at++] = int32_t(row * t.out[1] + column);
            }
}

template <int K, typename T>
void sums_of_taps(const Taps &t, int first) {
    constexpr int kMost = (kLanes == 16 ? 24 : 12) / K;  // as many as there are registers for
    constexpr int R = kMost > 6 ? 6 : kMost;
    const int64_t pixels = t.out[0] * t.out[1], all = t.images * pixels, taps = t.taps[0] * t.taps[1];
    const int64_t chunk = int64_t(K) * kLanes, whole = t.channels / kLanes * kLanes;
    for (int64_t tap = 0; tap < taps; ++tap) {  // pack
        float *to = t.packed + tap * K * padded(t.channels);
        for (int64_t channel = 0; channel < padded(t.channels); ++channel)
            for (int k = 0; k < K; ++k)
                to[channel / kLanes * chunk + k * kLanes + channel % kLanes] =
                    channel < t.channels ? t.kernel[((first + k) * t.channels + channel) * taps + tap] : 0;
    }
    for (int64_t start = 0; start < all; start += R) {
        const T *images[R];
        int64_t at[R], to[R];
        for (int r = 0; r < R; ++r) {
            const int64_t pixel = start + r < all ? start + r : all - 1, image = pixel / pixels;
            at[r] = pixel - image * pixels;
            to[r] = image * pixels + t.order[at[r]];
            images[r] = static_cast<const T *>(t.x) + image * t.size[0] * t.size[1] * t.channels;
        }
        Vector total[R][K] = {};
        for (int64_t tap = 0; tap < taps; ++tap) {
            const T *rows[R];
            bool any = false;
            for (int r = 0; r < R; ++r) {
                const int32_t other = t.meets[tap * pixels + at[r]];
                any = any || other >= 0;
                rows[r] = other < 0 ? static_cast<const T *>(t.nothing) : images[r] + other * t.channels;
            }
            if (!any) continue;
            const float *packed = t.packed + tap * K * padded(t.channels);
            const auto add = [&](const Vector (&values)[R]) {
                for (int k = 0; k < K; ++k) {
                    const Vector v = load(packed + k * kLanes);
                    for (int r = 0; r < R; ++r) total[r][k] += values[r] * v;
                }
                packed += chunk;
            };
            Vector values[R];
            for (int64_t channel = 0; channel < whole; channel += kLanes) {
                for (int r = 0; r < R; ++r) values[r] = load(rows[r] + channel);
                add(values);
            }
            if (whole < t.channels) {
                for (int r = 0; r < R; ++r) values[r] = load_some(rows[r] + whole, t.channels - whole);
                add(values);
            }
        }
        for (int r = 0; r < R && start + r < all; ++r)
            for (int k = 0; k < K; ++k) t.sums[(first + k) * all + to[r]] = sum(total[r][k]);
    }
}

// Lengths of what the kernel covers; where it has several taps, of the longest in each image: see Convolutions in
// tempo.verify.forms. Returns the length of all of it.
inline double lengths_of_taps(const Taps &t) {
    const int64_t pixels = t.out[0] * t.out[1], taps = t.taps[0] * t.taps[1];
    double all = 0;
    for (int64_t image = 0; image < t.images; ++image) {
        const double *lengths = t.lengths + image * t.size[0] * t.size[1];
        double *covered = t.covered + image * pixels, longest = 0;
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            double square = 0;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int32_t other = t.meets[tap * pixels + pixel];
                if (other >= 0) square += lengths[other] * lengths[other];
            }
            all += square;
            if (square > longest || square != square) longest = square;  // what is not a number stays
            covered[t.order[pixel]] = __builtin_sqrt(square);
        }
        for (int64_t pixel = 0; taps > 1 && pixel < pixels; ++pixel) covered[pixel] = __builtin_sqrt(longest);
    }
    return __builtin_sqrt(all);
}

inline double taps(const Taps &t) {
    meet(t);
    for (int first = 0; first < t.vectors; first += kVectorsAtOnce)
        with_count(least(t.vectors - first, kVectorsAtOnce), [&](auto count) {
            constexpr int K = decltype(count)::value;
            if constexpr (K > 0) t.half ? sums_of_taps<K, uint16_t>(t, first) : sums_of_taps<K, float>(t, first);
        });
    return lengths_of_taps(t);
}

}  // namespace tempo::TEMPO_ISA
