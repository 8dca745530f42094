#include "bind.h"

namespace {

using tempo::require;
using Matrix = tempo::Array<nb::ndim<2>, nb::device::cpu>;
using Ints = tempo::Array<const int32_t, nb::ndim<2>, nb::device::cpu>;
template <typename T>
using Line = tempo::Array<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Lines = tempo::Array<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Numbers = std::optional<Line<const float>>;
using Vectors = std::optional<Lines<const int32_t>>;
using Sums = std::optional<Lines<int64_t>>;
using Floats = tempo::Array<const float, nb::ndim<2>, nb::device::cpu>;
using Added = std::optional<std::tuple<Floats, Lines<const float>>>;

// Numbers from the start of a cache line on.
template <typename T>
class Memory {
  public:
    explicit Memory(int64_t count) : all(count + kLine / sizeof(T)) {}
    T *get() const { return reinterpret_cast<T *>((uintptr_t(all.data()) + kLine - 1) / kLine * kLine); }

  private:
    static constexpr size_t kLine = 64;
    std::vector<T> all;
};

// A seed's number, an element and what was put there instead, for every word that was refused.
using Refused = std::vector<std::tuple<int, int64_t, int32_t>>;

tempo::Refusals refusals(Refused &to) {
    const auto report = [](void *list, int seed, int64_t element, int32_t instead) {
        static_cast<Refused *>(list)->emplace_back(seed, element, instead);
    };
    return {report, &to};
}

const uint8_t *bytes_of(const nb::bytes &seed) {
    require(seed.size() == tempo::kSeedBytes, "a seed has 32 bytes");
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
    for (const auto &[number, element, instead] : refused) elements.push_back(element);
    return elements;
}

tempo::FieldSums field_sums(const Vectors &vectors, const Sums &sums, int64_t rows, int64_t columns) {
    if (!vectors) return {0, columns, nullptr, nullptr, nullptr};
    require(sums.has_value(), "sums have to go somewhere");
    require(int64_t(vectors->shape(0)) <= tempo::kMostFieldVectors && int64_t(vectors->shape(1)) == columns,
            "vectors have to be as long as rows, and not too many");
    require(int64_t(sums->shape(0)) == rows && sums->shape(1) == vectors->shape(0),
            "sums have to be one per row and vector");
    return {int(vectors->shape(0)), columns, vectors->data(), sums->data(), nullptr};
}

void sum_rows(const Ints &x, const Lines<const int32_t> &vectors, const Lines<int64_t> &out) {
    const int64_t rows = int64_t(x.shape(0)), columns = int64_t(x.shape(1));
    require(columns <= 1 || x.stride(1) == 1, "rows have to be contiguous");
    tempo::FieldRows r{{x.data(), x.stride(0)}, rows, field_sums(vectors, out, rows, columns), nullptr};
    nb::gil_scoped_release release;
    const Memory<int32_t> integers(tempo::word_count(0));
    const Memory<uint32_t> packed(r.sums.vectors * tempo::packed_width(columns));
    r.integers = integers.get(), r.sums.packed = packed.get();
    tempo::active->sum_rows(r);
}

// The seed's number, the element and what was subtracted instead, for every word that was refused.
Refused share(const Matrix &x, const Numbers &scales, double ratio, float least_step,
              const std::vector<nb::bytes> &seeds, int64_t first, const Lines<int32_t> &out, const Lines<float> &steps,
              const Vectors &vectors, const Sums &sums) {
    require(shares(), "these kernels cannot expand seeds");
    Refused refused;
    tempo::Shares s{};
    s.x = x.data();
    s.half = tempo::is_bfloat16(x.dtype());
    require(s.half || x.dtype() == nb::dtype<float>(), "rows are float32 or bfloat16");
    s.rows = int64_t(x.shape(0)), s.columns = int64_t(x.shape(1)), s.stride = x.stride(0);
    require(s.columns <= 1 || x.stride(1) == 1, "rows have to be contiguous");
    require(!scales || int64_t(scales->shape(0)) == s.columns, "scales have to be as many as columns");
    s.scales = scales ? scales->data() : nullptr;
    s.ratio = ratio, s.least_step = least_step;
    require(seeds.size() <= size_t(tempo::kMostSeeds), "there are too many seeds");
    std::vector<uint8_t> keys;
    for (const nb::bytes &seed : seeds) keys.insert(keys.end(), bytes_of(seed), bytes_of(seed) + tempo::kSeedBytes);
    s.seeds = int(seeds.size()), s.seed = keys.data();
    require(first >= 0, "elements are counted from zero");
    s.first = first;
    require(int64_t(out.shape(0)) == s.rows && int64_t(out.shape(1)) == s.columns, "a share has to be like the rows");
    require(int64_t(steps.shape(0)) == s.rows && steps.shape(1) == 1, "steps have to be one per row");
    s.out = out.data(), s.steps = steps.data();
    s.sums = field_sums(vectors, sums, s.rows, s.columns);
    s.refusals = refusals(refused);
    {
        nb::gil_scoped_release release;
        const Memory<int32_t> words(tempo::word_count(s.seeds));
        const Memory<uint32_t> packed(s.sums.vectors * tempo::packed_width(s.columns));
        s.words = words.get(), s.sums.packed = packed.get();
        tempo::active->share(s);
    }
    return refused;
}

tempo::LowRank low_rank(const std::tuple<Floats, Lines<const float>> &added, int64_t rows, int64_t columns) {
    const auto &[low, up] = added;
    require(int64_t(low.shape(0)) == rows && int64_t(up.shape(1)) == columns && low.shape(1) == up.shape(0),
            "factors of what is added do not make an output");
    require(low.shape(1) <= 1 || low.stride(1) == 1, "rows have to be contiguous");
    return {int(low.shape(1)), low.data(), low.stride(0), up.data()};
}

void combine(const std::vector<Ints> &parts, const Lines<const float> &steps, const Numbers &scales,
             const std::vector<Numbers> &biases, const std::vector<Matrix> &outs, const Vectors &vectors,
             const Sums &sums, const std::vector<Added> &added) {
    const int64_t rows = int64_t(steps.shape(0));
    require(steps.shape(1) == 1, "steps have to be one per row");
    require(biases.size() == outs.size(), "biases have to be as many as outputs");
    require(added.empty() || added.size() == outs.size(), "what is added has to be as much as outputs");
    std::vector<tempo::Output> outputs;
    int64_t columns = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
        const Matrix &out = outs[i];
        const bool half = tempo::is_bfloat16(out.dtype());
        require(half || out.dtype() == nb::dtype<float>(), "outputs are float32 or bfloat16");
        require(out.shape(1) <= 1 || out.stride(1) == 1, "rows have to be contiguous");
        require(int64_t(out.shape(0)) == rows, "outputs have to have as many rows as there are steps");
        require(!biases[i] || biases[i]->shape(0) == out.shape(1), "a bias has to be as long as its columns");
        const float *bias = biases[i] ? biases[i]->data() : nullptr;
        outputs.push_back({out.data(), half, int64_t(out.shape(1)), out.stride(0), bias, {}});
        if (!added.empty() && added[i]) outputs.back().added = low_rank(*added[i], rows, outputs.back().columns);
        columns += int64_t(out.shape(1));
    }
    require(!parts.empty() && parts.size() <= size_t(tempo::kMostParts), "there are no parts, or too many");
    std::vector<tempo::Part> pointers;
    for (const Ints &part : parts) {
        require(int64_t(part.shape(0)) == rows && int64_t(part.shape(1)) == columns,
                "parts have to be as large as all outputs together");
        require(columns <= 1 || part.stride(1) == 1, "rows have to be contiguous");
        pointers.push_back({part.data(), part.stride(0)});
    }
    require(!scales || int64_t(scales->shape(0)) == columns, "scales have to be as many as columns");
    tempo::Combination c{};
    c.rows = rows, c.parts = pointers.data(), c.part_count = int(pointers.size());
    c.steps = steps.data(), c.scales = scales ? scales->data() : nullptr;
    c.outs = outputs.data(), c.out_count = int(outputs.size());
    c.sums = field_sums(vectors, sums, rows, columns);
    nb::gil_scoped_release release;
    const Memory<int32_t> integers(tempo::word_count(0));
    const Memory<uint32_t> packed(c.sums.vectors * tempo::packed_width(columns));
    const Memory<float> products(tempo::added_floats(c));
    c.integers = integers.get(), c.sums.packed = packed.get(), c.added = products.get();
    tempo::active->combine(c);
}

}  // namespace

namespace tempo {

void bind_shares(nb::module_ &m) {
    m.def("shares", &::shares);
    m.def("expand", &::expand, nb::arg("seed"), nb::arg("block"), nb::arg("out"), nb::arg("half"));
    m.def("sum_rows", &::sum_rows, nb::arg("x"), nb::arg("vectors"), nb::arg("out"));
    m.def("share", &::share, nb::arg("x"), nb::arg("scales").none(), nb::arg("ratio"), nb::arg("least_step"),
          nb::arg("seeds"), nb::arg("first"), nb::arg("out"), nb::arg("steps"), nb::arg("vectors").none(),
          nb::arg("sums").none());
    m.def("combine", &::combine, nb::arg("parts"), nb::arg("steps"), nb::arg("scales").none(), nb::arg("biases"),
          nb::arg("outs"), nb::arg("vectors").none(), nb::arg("sums").none(), nb::arg("added") = std::vector<Added>{});
}

}  // namespace tempo
