#include "bind.h"

namespace {

using tempo::require;
using Numbers = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Triangles = nb::ndarray<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Squares = nb::ndarray<double, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// An even number of random 64-bit words become standard normal numbers, in place.
void gaussians(const Numbers &numbers) {
    require(numbers.shape(0) % 2 == 0, "normal numbers come in pairs");
    nb::gil_scoped_release release;
    tempo::active->gaussians(numbers.data(), int64_t(numbers.shape(0) / 2));
}

void orthogonal(const Triangles &numbers, const Squares &q) {
    const int64_t count = int64_t(q.shape(0)), side = int64_t(q.shape(1));
    require(int64_t(q.shape(2)) == side, "orthogonal matrices are square");
    require(int64_t(numbers.shape(0)) == count && int64_t(numbers.shape(1)) == side * (side + 1) / 2,
            "a matrix takes a triangle of normal numbers");
    nb::gil_scoped_release release;
    std::vector<double> memory(tempo::haar_doubles(side));
    tempo::active->orthogonal({count, side, numbers.data(), q.data(), memory.data()});
}

}  // namespace

namespace tempo {

void bind_haar(nb::module_ &m) {
    m.def("gaussians", &::gaussians, nb::arg("numbers"));
    m.def("orthogonal", &::orthogonal, nb::arg("gaussians"), nb::arg("q"));
}

}  // namespace tempo
