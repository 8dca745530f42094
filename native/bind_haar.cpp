#include "bind.h"

namespace {

using tempo::require;
template <typename Real>
using Numbers = tempo::Array<Real, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename Real>
using Triangles = tempo::Array<const Real, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename Real>
using Squares = tempo::Array<Real, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// A random word becomes one of 0 to count - 1, each as likely as another, but for a few words that would favour some
// (Lemire, ACM Trans. Model. Comput. Simul. 29, 2019): false then.
bool scale(int64_t *word, uint64_t count) {
    const auto product = static_cast<unsigned __int128>(uint64_t(*word)) * count;
    const uint64_t rest = uint64_t(product);
    *word = int64_t(product >> 64);
    return rest >= count || rest >= -count % count;
}

// Random words become a uniform permutation (Fisher and Yates), or uniform integers, in place; false if any word was one
// that would favour some, so that all have to be drawn again.
bool permutation(const Numbers<int64_t> &words) {
    int64_t *to = words.data();
    bool fair = true;
    for (int64_t i = 0; i < int64_t(words.shape(0)); ++i) {
        fair &= scale(to + i, i + 1);
        const int64_t at = to[i];
        to[i] = to[at];
        to[at] = i;
    }
    return fair;
}

bool integers(const Numbers<int64_t> &words, int64_t low, int64_t count) {
    require(count > 0, "there has to be an integer to draw");
    bool fair = true;
    for (int64_t i = 0; i < int64_t(words.shape(0)); ++i) {
        fair &= scale(words.data() + i, count);
        words.data()[i] += low;
    }
    return fair;
}

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
    m.def("permutation", &::permutation, nb::arg("words").noconvert());
    m.def("integers", &::integers, nb::arg("words").noconvert(), nb::arg("low"), nb::arg("count"));
    m.def("gaussians", &::gaussians<float>, nb::arg("numbers").noconvert());
    m.def("gaussians", &::gaussians<double>, nb::arg("numbers").noconvert());
    m.def("orthogonal", &::orthogonal<float>, nb::arg("gaussians"), nb::arg("q").noconvert());
    m.def("orthogonal", &::orthogonal<double>, nb::arg("gaussians"), nb::arg("q").noconvert());
}

}  // namespace tempo
