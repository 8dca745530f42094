#include <algorithm>

#include "bind.h"

namespace {

using tempo::Lanczos;
using tempo::require;
using Matrix = tempo::Array<const float, nb::ndim<2>, nb::device::cpu>;
using Line = tempo::Array<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Square = tempo::Array<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Fills the upper triangle of `projected`, of as many steps as it has rows.
void lanczos(const Matrix &w, const Line &z, const Square &projected) {
    Lanczos l{};
    l.w = w.data(), l.rows = int64_t(w.shape(0)), l.columns = int64_t(w.shape(1)), l.stride = w.stride(0);
    l.steps = int(projected.shape(0)), l.projected = projected.data();
    require(l.columns <= 1 || w.stride(1) == 1, "rows have to be contiguous");
    require(int64_t(z.shape(0)) == l.side(), "a vector has to be as long as the smaller side");
    require(projected.shape(1) == projected.shape(0) && l.steps > 0 && l.steps <= l.side(),
            "what is projected has to be square, and no larger than the matrix");
    nb::gil_scoped_release release;
    std::vector<float> basis(l.steps * l.side()), memory(lanczos_floats(l));
    std::copy(z.data(), z.data() + l.side(), basis.data());
    l.basis = basis.data(), l.memory = memory.data();
    tempo::active->lanczos(l);
}

}  // namespace

namespace tempo {

void bind_lanczos(nb::module_ &m) {
    m.def("lanczos", &::lanczos, nb::arg("w"), nb::arg("z"), nb::arg("projected").noconvert());
}

}  // namespace tempo
