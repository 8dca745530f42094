// What shares of scheme `split` are made of: residues mod p, the largest prime below 2^32, as int32.
#pragma once

#include <cstdint>

#include "low_rank_types.h"

namespace tempo {

constexpr int64_t kSeedBytes = 32;
constexpr int kMostSeeds = 15;
constexpr int kMostParts = kMostSeeds + 1;
constexpr int kMostFieldVectors = 8;
constexpr int64_t kAhead = 2048;  // words of a share that are expanded at a time: they stay in the first-level cache

// Who is told of words that are no residues, for each seed in ascending order, and what was put there: others have to
// take their places.
struct Refusals {
    void (*report)(void *to, int seed, int64_t element, int32_t instead);
    void *to;
};

// `count` words of the keystream under `seed`, from block `block` on; refused are those beyond `half`.
struct Expansion {
    const uint8_t *seed;
    int64_t block;
    int32_t half;
    int32_t *out;
    int64_t count;
    Refusals refusals;
};

// Sums of rows of integers with secret vectors of residues.
struct FieldSums {
    int vectors;       // kMostFieldVectors at most
    int64_t columns;
    const int32_t *v;  // (vectors, columns)
    int64_t *sums;     // (rows, vectors): residues
    uint32_t *packed;  // memory for `packed_width` numbers for each vector, in whole cache lines
};

inline int64_t packed_width(int64_t columns) { return (columns + 47) / 16 * 16; }  // with what may be read beyond

// Integers of one matrix, its rows contiguous and `stride` elements apart; they may be changed by others meanwhile.
struct Part {
    const int32_t *data;
    int64_t stride;
};

struct FieldRows {
    Part x;
    int64_t rows;
    FieldSums sums;
    int32_t *integers;  // memory for `word_count(0)` numbers, in whole cache lines
};

// Rows are rounded to integers, and less the shares that seeds stand for: src/tempo/schemes/fixed_point.py.
struct Shares {
    const void *x;  // (rows, columns), float32 or bfloat16, its rows contiguous and `stride` elements apart
    bool half;
    int64_t rows, columns, stride;
    const float *scales;  // (columns), or null
    double ratio;         // of the step of a row and its norm
    float least_step;
    int seeds;            // kMostSeeds at most
    const uint8_t *seed;  // (seeds, kSeedBytes)
    int64_t first;        // which element of a share the first one here meets
    int32_t *out;         // (rows, columns)
    float *steps;         // (rows)
    FieldSums sums;       // of the rounded rows
    int32_t *words;       // memory for `word_count` numbers, in whole cache lines
    Refusals refusals;    // elements from which another word than was refused has to be subtracted
};

// The next columns of the sum of `parts`, as numbers.
struct Output {
    void *data;  // (rows, columns), float32 or bfloat16, its rows contiguous and `stride` elements apart
    bool half;
    int64_t columns, stride;
    const float *bias;  // (columns), or null
    LowRank added;
};

// Products of shares are added up, and get their scale again.
struct Combination {
    int64_t rows;
    const Part *parts;
    int part_count;       // 1 to kMostParts
    const float *steps;   // (rows)
    const float *scales;  // (columns), or null
    const Output *outs;
    int out_count;
    FieldSums sums;       // of the sum of parts
    int32_t *integers;    // memory for `word_count(0)` numbers, in whole cache lines
    float *added;         // memory for `added_floats` numbers
};

inline int64_t added_stride(const Output &to) { return (to.columns + 15) / 16 * 16; }
inline int64_t added_floats(const Combination &c) {
    int64_t count = 0;
    for (int o = 0; o < c.out_count; ++o)
        if (c.outs[o].added.rank) count += kMostLowRankRows * added_stride(c.outs[o]);
    return count;
}

inline int64_t word_count(int seeds) { return (seeds + 1) * kAhead + 16; }

}  // namespace tempo
