#pragma once

#include <cstdint>

namespace tempo {

// `count` orthogonal matrices q (count, side, side).
struct Haar {
    int64_t count, side;
    const double *gaussians;  // (count, side (side + 1) / 2): what reflections are made of, the longest one first
    double *q;
    double *memory;  // for `haar_doubles` numbers
};

inline int64_t haar_doubles(int64_t side) { return 8 * side * (side + 2); }  // 8: lanes of the longest vector

}  // namespace tempo
