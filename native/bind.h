// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "table.h"

namespace nb = nanobind;

namespace tempo {

extern const Table *active;

inline void require(bool holds, const char *what) {
    if (!holds) throw std::invalid_argument(what);
}

inline bool is_bfloat16(nb::dlpack::dtype dtype) {
    return dtype.code == uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16 && dtype.lanes == 1;
}

void bind_haar(nb::module_ &m);
void bind_sandwich(nb::module_ &m);
void bind_sums(nb::module_ &m);
void bind_layers(nb::module_ &m);
void bind_lanczos(nb::module_ &m);
void bind_patches(nb::module_ &m);
void bind_shares(nb::module_ &m);
void bind_zeros(nb::module_ &m);

}  // namespace tempo
