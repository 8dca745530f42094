// Products of a tall matrix with a few vectors: src/tempo/schemes/low_rank.py.
#pragma once

#include <cstdint>

namespace tempo {

constexpr int64_t kTallPanel = 16;  // rows that are read together, twice where both products are wanted
constexpr int kMostLowRankRows = 8;  // of any instruction set, that are made together to be added to others

// `x` is (rows, columns), float32 or bfloat16, its rows contiguous and `stride` elements apart; all else is float32.
struct Tall {
    const void *x;
    bool half;
    int64_t rows, columns, stride;

    int vectors;          // with each row; 0: not wanted
    const float *v;       // (vectors, columns)
    float *of_rows;       // (rows, vectors), `rows_stride` elements apart: x vᵀ
    int64_t rows_stride;

    int weights;          // with each column; 0: not wanted
    const float *q;       // (rows, weights), `q_stride` elements apart
    int64_t q_stride;
    float *of_columns;    // (weights, columns): qᵀ x

    float *totals;  // memory for `totals_floats` numbers
};

inline int64_t totals_floats(const Tall &t) { return (t.vectors + 1) / 2 * int64_t(16 * 16); }

// (rank) numbers for each row, `low_stride` elements apart, times (rank, columns): added to what a row consists of.
struct LowRank {
    int rank;  // 0: nothing is added
    const float *low;
    int64_t low_stride;
    const float *up;
};

}  // namespace tempo
