#include "bind.h"

namespace {

using tempo::require;
template <typename T>
using Line = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t kSeed = 32;  // bytes

// A seed's number and an element, for every word that was refused.
using Refused = std::vector<std::tuple<int, int64_t>>;

tempo::Refusals refusals(Refused &to) {
    return {[](void *list, int seed, int64_t element) { static_cast<Refused *>(list)->emplace_back(seed, element); }, &to};
}

const uint8_t *bytes_of(const nb::bytes &seed) {
    require(seed.size() == kSeed, "a seed has 32 bytes");
    return static_cast<const uint8_t *>(seed.data());
}

// Whether the kernels in use have what `expand` and `share` need.
bool shares() { return tempo::active->expand; }

std::vector<int64_t> expand(const nb::bytes &seed, int64_t block, const Line<int32_t> &out, int32_t half) {
    require(shares(), "these kernels cannot expand seeds");
    require(block >= 0 && half >= 0, "a block and the largest residue are not negative");
    Refused refused;
    tempo::Expansion expansion{bytes_of(seed), block, half, out.data(), int64_t(out.shape(0)), refusals(refused)};
    {
        nb::gil_scoped_release release;
        tempo::active->expand(expansion);
    }
    std::vector<int64_t> elements;
    for (const auto &[number, element] : refused) elements.push_back(element);
    return elements;
}

}  // namespace

namespace tempo {

void bind_shares(nb::module_ &m) {
    m.def("shares", &::shares);
    m.def("expand", &::expand, nb::arg("seed"), nb::arg("block"), nb::arg("out"), nb::arg("half"));
}

}  // namespace tempo
