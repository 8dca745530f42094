// What sums of a matrix are made of: products with secret vectors on either side, and lengths.
#pragma once

#include <cstdint>

namespace tempo {

constexpr int kVectorsAtOnce = 8;  // more are taken in turns
constexpr int kWidest = 16;        // lanes of the longest vector of any instruction set

// `x` is (rows, columns), float32 or bfloat16, its rows contiguous and `stride` elements apart.
struct Sums {
    const void *x;
    bool half;
    int64_t rows, columns, stride;

    void *copy;  // like `x` but without gaps, or null; all below is then of what was copied, not of `x` read again

    int vectors;          // with each row
    const float *v;       // (vectors, columns)
    float *of_rows;       // (vectors, rows): v xᵀ
    double *row_lengths;  // (rows)

    bool by_column;          // whether the following is wanted
    int weights;             // with each column
    const float *q;          // (weights, rows)
    float *of_columns;       // (weights, columns): q x
    double *column_lengths;  // (columns)

    float *packed;    // memory for `packed_floats` numbers
    double *totals;   // memory for `totals_doubles` numbers, if `by_column`
};

// `x` is (images, size[0], size[1], channels), float32 or bfloat16, without gaps.
struct Taps {
    const void *x;
    bool half, back;  // `back`: from a convolution's output to its input
    int64_t images, size[2], out[2], channels;
    int64_t taps[2], stride[2], padding[2], dilation[2];

    int vectors;
    const float *kernel;    // (vectors, channels, taps)
    float *sums;            // (vectors, images, out)
    const double *lengths;  // (images, size)
    double *covered;        // (images, out)

    float *packed;      // memory for the vectors of `kVectorsAtOnce`, each tap's channels padded
    int32_t *meets;     // (taps, out)
    int32_t *order;     // (out)
    const void *nothing;  // as many zeros as there are channels
};

// Sums of an answer's rows with vectors, and of what it should be: see compare.h. `lengths` are of one operand's rows,
// `other` is the length of the other operand, `answers` are lengths of the answer's rows.
struct Comparison {
    int64_t groups, rows;
    int vectors;
    const float *found, *expected;    // (groups, vectors, rows)
    const double *lengths, *answers;  // (groups, rows)
    const double *other;              // (groups)

    double of_scale, of_rounded, of_answer, lost;  // terms of the error: see tempo.verify.tolerance
    double drift, threshold;
    double limit;  // scales from here on excuse what is not finite

    double ratio, residual, tolerance;  // of the worst row, `worst` of (groups, rows)
    int64_t worst, unchecked;
};

inline int64_t padded(int64_t columns) { return (columns + kWidest - 1) / kWidest * kWidest; }
inline int64_t packed_floats(const Sums &s) {
    return padded(s.columns) * (s.vectors + (s.by_column ? s.weights + 1 : 0));
}
inline int64_t totals_doubles(const Sums &s) { return s.by_column ? padded(s.columns) * (s.weights + 1) : 0; }

}  // namespace tempo
