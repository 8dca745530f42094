#include "bind.h"

namespace {

using tempo::Patches;
using tempo::require;
template <typename T>
using Pixels = tempo::Array<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Met = tempo::Array<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Patches patches_of(const Met &met, size_t images, size_t inputs, size_t channels, size_t outputs, size_t features) {
    const Patches p{int64_t(images), int64_t(inputs), int64_t(outputs), int64_t(channels), int64_t(met.shape(1)),
                    met.data()};
    require(met.shape(0) == outputs && features == channels * met.shape(1),
            "patches have to be as many as pixels that are met, of all channels and taps");
    for (int64_t i = 0; i < p.outputs * p.taps; ++i)
        require(p.met[i] >= -1 && p.met[i] < p.inputs, "a pixel that is met has to be there");
    return p;
}

void make_patches(const Pixels<const float> &maps, const Met &met, const Pixels<float> &patches) {
    const Patches p = patches_of(met, maps.shape(0), maps.shape(1), maps.shape(2), patches.shape(1), patches.shape(2));
    require(patches.shape(0) == maps.shape(0), "images have to be as many");
    nb::gil_scoped_release release;
    tempo::active->make_patches(p, maps.data(), patches.data());
}

void add_patches(const Pixels<const float> &patches, const Met &met, const Pixels<float> &maps) {
    const Patches p = patches_of(met, maps.shape(0), maps.shape(1), maps.shape(2), patches.shape(1), patches.shape(2));
    require(patches.shape(0) == maps.shape(0), "images have to be as many");
    nb::gil_scoped_release release;
    tempo::active->add_patches(p, patches.data(), maps.data());
}

}  // namespace

namespace tempo {

void bind_patches(nb::module_ &m) {
    m.def("make_patches", &::make_patches, nb::arg("maps"), nb::arg("met"), nb::arg("patches").noconvert());
    m.def("add_patches", &::add_patches, nb::arg("patches"), nb::arg("met"), nb::arg("maps").noconvert());
}

}  // namespace tempo
