// What kernels of trusted layers are given.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tempo {

enum class Activation { gelu, gelu_tanh, silu };

// One number of an operand of attention for each (sample, head, token, feature); features lie side by side, strides are
// in elements.
struct Heads {
    float *data;
    int64_t sample, head, token;
};

struct Attention {
    int64_t samples, heads, queries, keys, width;  // width: of every operand; a multiple of kWidths
    int64_t group;                                 // heads that share one head of k and v
    float scale;
    bool causal;  // a query sees no keys beyond its own number
    Heads q, k, v, out;
    float *lse;  // (samples, heads, queries), contiguous: logarithm of the sum of the exponentials

    // Only for gradients.
    Heads g, dq, dk, dv;

    float *memory;  // attention_floats() of them
};

constexpr int kWidths = 16;        // lanes of the longest vector of any instruction set
constexpr int64_t kQueries = 96;  // queries at a time, at most

constexpr int64_t kCausalQueries = 64;  // where keys are masked: smaller blocks compute fewer masked scores

// From one row of scores to the next: an odd number of cache lines, or columns would share few places in the cache.
inline int64_t score_stride(int64_t keys) { return ((keys + kWidths - 1) / kWidths | 1) * kWidths; }

// Two blocks of scores, five packed operands.
inline int64_t attention_floats(const Attention &a) {
    const int64_t stride = score_stride(a.keys), tall = stride > kQueries ? stride : kQueries;
    return 2 * kQueries * stride + 5 * tall * a.width;
}

// (rows, width), contiguous, each row over its root mean square. `out` is y where `g` is null, else dx.
struct RmsNorm {
    const float *x, *weight, *g;
    float *out;
    float *inverse;  // (rows): one over the root mean square, written with y and read for dx
    int64_t rows, width;
    float eps;
};

// Of what `sum_channels` adds up, by channel: x less its center, or a gradient as it comes, through ReLU of a
// normalization, or through ReLU of the sum of that and a residual.
enum class Summed { inputs, gradients, through_relu, through_relu_of_sum };

// Operands are (rows, width), contiguous, those of channels (width).
struct ChannelSums {
    Summed what;
    const float *x, *g, *y;  // y: what ReLU gave, where it is of a sum
    const float *center, *scale, *shift;
    float *passed;  // where to write the gradient that ReLU lets through, where it is of a sum
    double *sums;   // (2, width), added to
    int64_t rows, width;
};

// `out` is y where `g` is null, else dx; center, slope and mean are null where statistics are not the batch's.
struct Normalization {
    const float *x, *residual, *g;
    const float *scale, *shift, *center, *slope, *mean;
    bool relu;
    float *out;
    int64_t rows, width;
};

// Pairs of features (i, i + width / 2) turned by an angle each; features lie side by side.
struct Rotation {
    int64_t samples, heads, tokens, width;  // width: a multiple of 2 kWidths
    Heads x, out;
    const float *cos, *sin;  // (tokens, width) for each sample, or one for all
    int64_t sample;          // from one sample's to the next, in elements
    bool back;               // by its transpose: what gradients take
};

}  // namespace tempo
