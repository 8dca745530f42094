#include "bind.h"

namespace {

using tempo::require;
template <typename Real>
using Numbers = tempo::Array<Real, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename Real>
using Triangles = tempo::Array<const Real, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename Real>
using Squares = tempo::Array<Real, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// An even number of random words become standard normal numbers, in place.
template <typename Real>
void gaussians(const Numbers<Real> &numbers) {
    require(numbers.shape(0) % 2 == 0, "normal numbers come in pairs");
    const int64_t half = int64_t(numbers.shape(0) / 2);
    nb::gil_scoped_release release;
    if constexpr (std::is_same_v<Real, float>)
        tempo::active->gaussians_single(numbers.data(), half);
    else
        tempo::active->gaussians(numbers.data(), half);
}

template <typename Real>
void orthogonal(const Triangles<Real> &numbers, const Squares<Real> &q) {
    const int64_t count = int64_t(q.shape(0)), side = int64_t(q.shape(1));
    require(int64_t(q.shape(2)) == side, "orthogonal matrices are square");
    require(int64_t(numbers.shape(0)) == count && int64_t(numbers.shape(1)) == side * (side + 1) / 2,
            "a matrix takes a triangle of normal numbers");
    nb::gil_scoped_release release;
    float *memory = tempo::scratch(0, size_t(tempo::haar_numbers(side)) * (sizeof(Real) / sizeof(float)));
    const tempo::Haar<Real> haar{count, side, numbers.data(), q.data(), reinterpret_cast<Real *>(memory)};
    if constexpr (std::is_same_v<Real, float>)
        tempo::active->orthogonal_single(haar);
    else
        tempo::active->orthogonal(haar);
}

}  // namespace

namespace tempo {

void bind_haar(nb::module_ &m) {
    m.def("gaussians", &::gaussians<float>, nb::arg("numbers").noconvert());
    m.def("gaussians", &::gaussians<double>, nb::arg("numbers").noconvert());
    m.def("orthogonal", &::orthogonal<float>, nb::arg("gaussians"), nb::arg("q").noconvert());
    m.def("orthogonal", &::orthogonal<double>, nb::arg("gaussians"), nb::arg("q").noconvert());
}

}  // namespace tempo
