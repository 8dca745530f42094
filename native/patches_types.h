// A convolution's patches: src/tempo/engine/patches.py.
#pragma once

#include <cstdint>

namespace tempo {

// `maps` (images, inputs, channels) and `patches` (images, outputs, channels, taps), contiguous.
struct Patches {
    int64_t images, inputs, outputs, channels, taps;
    const int32_t *met;  // (outputs, taps): the input pixel, or -1 in the padding
};

}  // namespace tempo
