// What the Lanczos process reads and writes: src/tempo/schemes/cloak.py.
#pragma once

#include <cstdint>

namespace tempo {

// Of `w` (rows, columns; rows contiguous, `stride` apart): w wᵀ or wᵀ w, whichever has the smaller `side`.
struct Lanczos {
    const float *w;
    int64_t rows, columns, stride;
    int steps;
    double *projected;  // (steps, steps): its columns from the diagonal up
    float *basis;       // (steps, side), the first of length one
    float *memory;      // for `lanczos_floats` numbers

    int64_t side() const { return rows < columns ? rows : columns; }
};

constexpr int64_t kLanczosPanel = 1 << 17;  // elements of a wide matrix read together, so that the second time is cached

inline int64_t lanczos_columns(const Lanczos &l) {
    const int64_t some = kLanczosPanel / (l.rows > 0 ? l.rows : 1) / 64 * 64;
    return some < 64 ? 64 : some;
}
inline int64_t lanczos_floats(const Lanczos &l) { return l.side() + lanczos_columns(l); }

}  // namespace tempo
