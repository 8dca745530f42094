#include <utility>

#include "bind.h"

namespace {

using tempo::require;
using tempo::Zeros;
using Maps = tempo::Array<nb::ndim<3>, nb::device::cpu>;
using Flags = tempo::Array<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Zeros zeros_in(const Maps &x) {
    const auto code = nb::dlpack::dtype_code(x.dtype().code);
    require(code == nb::dlpack::dtype_code::Float || code == nb::dlpack::dtype_code::Bfloat, "numbers have to be floats");
    require(x.dtype().bits == 16 || x.dtype().bits == 32 || x.dtype().bits == 64, "floats of 16, 32 or 64 bits");
    require(x.shape(2) < INT32_MAX, "there are too many columns");
    return {x.data(),        x.dtype().bits / 8, int64_t(x.shape(0)), int64_t(x.shape(1)), int64_t(x.shape(2)),
            x.stride(0), x.stride(1),        x.stride(2)};
}

void dead_rows(const Maps &x, const Flags &dead) {
    Zeros z = zeros_in(x);
    if (z.columns == 1 || (z.positions > 1 && z.position_stride < z.column_stride)) {  // neighbours last
        std::swap(z.positions, z.columns);
        std::swap(z.position_stride, z.column_stride);
    }
    require(int64_t(dead.shape(0)) == z.rows, "there has to be one flag per row");
    nb::gil_scoped_release release;
    tempo::active->dead_rows(z, dead.data());
}

void dead_columns(const Maps &x, const Flags &dead) {
    const Zeros z = zeros_in(x);
    require(int64_t(dead.shape(0)) == z.columns, "there has to be one flag per column");
    nb::gil_scoped_release release;
    std::vector<int32_t> candidates(z.columns);
    tempo::active->dead_columns(z, dead.data(), candidates.data());
}

}  // namespace

namespace tempo {

void bind_zeros(nb::module_ &m) {
    m.def("dead_rows", &::dead_rows, nb::arg("x"), nb::arg("dead").noconvert());
    m.def("dead_columns", &::dead_columns, nb::arg("x"), nb::arg("dead").noconvert());
}

}  // namespace tempo
