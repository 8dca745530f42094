#pragma once

#include <cstdint>

namespace tempo {

// `count` orthogonal matrices q (count, side, side).
template <typename Real>
struct Haar {
    int64_t count, side;
    const Real *gaussians;  // (count, side (side + 1) / 2): what reflections are made of, a lower triangle by rows
    Real *q;
    Real *memory;  // for `haar_numbers` of them, aligned to vectors
};

constexpr int64_t kMostLanes = 16;

// A line of `side` numbers, in whole vectors.
inline int64_t haar_line(int64_t side) { return (side + kMostLanes - 1) / kMostLanes * kMostLanes; }

inline int64_t haar_numbers(int64_t side) { return (side + 4) * haar_line(side) + side * 2 * kMostLanes; }

}  // namespace tempo
