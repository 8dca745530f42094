// What shares of scheme `split` are made of: residues mod p, the largest prime below 2^32, as int32.
#pragma once

#include <cstdint>

namespace tempo {

// Who is told of words that are no residues, in ascending order: another one has to take the place of each.
struct Refusals {
    void (*report)(void *to, int seed, int64_t element);
    void *to;
};

// `count` words of the keystream under `seed` (32 bytes), from block `block` on; refused are those beyond `half`.
struct Expansion {
    const uint8_t *seed;
    int64_t block;
    int32_t half;
    int32_t *out;
    int64_t count;
    Refusals refusals;
};

}  // namespace tempo
