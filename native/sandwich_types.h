// What a sandwich is made of: `rows · x · columnsᵀ`, see src/tempo/schemes/sandwich.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tempo {

// One block of a block-diagonal matrix: from `start` on, `side` elements become as many others.
struct Block {
    int start;
    int side;
    int64_t from, to;     // strides of `values`
    const float *values;  // values[k * from + o * to]: how much of element k goes into element o
};

// An operator along one axis: gathers with block-diagonal matrices between them, one gather more than matrices.
struct Operator {
    int size = 0;
    int rounds = 0;
    const int32_t *const *gathers = nullptr;
    const int32_t *last_inverse = nullptr;  // undoes the last gather
    const float *scale = nullptr;           // only without blocks; null is all ones
    const Block *const *blocks = nullptr;   // of each round
    const int *counts = nullptr;            // how many each round has
};

// A matrix whose rows are contiguous; the stride in elements.
struct Matrix {
    void *data;
    int64_t rows, columns, row_stride;
    bool half;  // bfloat16, else float32
};

// A part of what is written: rows and columns from `row` and `column` on.
struct Piece {
    Matrix to;
    int64_t row, column;
    const float *bias;  // one number for each of its columns, or null
};

// Memory to work in, kept between calls: fresh memory would cost a page fault for every 4 KiB.
float *scratch(int which, size_t floats);

// Sums of the rows of what is read, with at most kMostWatched vectors each.
constexpr int kMostWatched = 16;

struct Watch {
    int vectors;
    const float *v;     // (vectors, columns)
    float *sums;        // (vectors, rows)
    double *lengths;    // (rows)
    // Whether all squares were within float's range, and the largest sum of squares.
    bool finite;
    float longest;
};

// Sums of what is written, after rounding: of its rows, and of its columns weighted by row, at most 8 of these.
struct Tally {
    Watch rows;
    int weights;
    const float *q;        // (weights, rows)
    float *recent;         // (weights + 1, padded columns), the last for squares: zeros to begin with
    double *totals;        // the same: what was summed so far
    int64_t since;         // rows in `recent`
};

// A matrix of low rank that is added to the result: `left` (rows, rank) times `right` (rank, columns).
struct Addend {
    int rank = 0;
    const float *left = nullptr, *right = nullptr;
};

struct Sandwich {
    Matrix x;
    const Operator *rows;     // null: the identity
    const Operator *columns;  // null: the identity
    const Piece *pieces;
    int count;
    Addend plus;
    Watch *watch;  // or null
    Tally *tally;  // or null; only of one piece, with nothing added to it
};

}  // namespace tempo
