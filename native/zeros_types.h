// Where to look for rows and columns of zeros: src/tempo/schemes/cover.py.
#pragma once

#include <cstdint>

namespace tempo {

// (rows, positions, columns) in any strides, counted in elements of so many bytes, which have a sign bit first.
struct Zeros {
    const void *x;
    int bytes;  // 2, 4 or 8
    int64_t rows, positions, columns;
    int64_t row_stride, position_stride, column_stride;
};

}  // namespace tempo
