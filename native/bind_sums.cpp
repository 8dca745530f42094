#include "bind.h"

namespace {

using tempo::Comparison;
using tempo::require;
using tempo::Sums;
using tempo::Taps;
using Matrix = tempo::Array<nb::ndim<2>, nb::device::cpu>;
template <typename T>
using Line = tempo::Array<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Lines = tempo::Array<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Fills `of_rows` and `row_lengths`; where `q` is given, `of_columns` and `column_lengths` too.
void sums(const Matrix &x, const std::optional<Matrix> &copy, const Lines<const float> &v, const Lines<float> &of_rows,
          const Line<double> &row_lengths, const std::optional<Lines<const float>> &q,
          const std::optional<Lines<float>> &of_columns, const std::optional<Line<double>> &column_lengths) {
    Sums s{};
    s.x = x.data();
    s.half = tempo::is_bfloat16(x.dtype());
    require(s.half || x.dtype() == nb::dtype<float>(), "a matrix is float32 or bfloat16");
    s.rows = int64_t(x.shape(0)), s.columns = int64_t(x.shape(1)), s.stride = x.stride(0);
    require(s.columns <= 1 || x.stride(1) == 1, "rows have to be contiguous");
    if (copy) {
        require(copy->dtype() == x.dtype() && int64_t(copy->shape(0)) == s.rows && int64_t(copy->shape(1)) == s.columns,
                "a copy has to be like the matrix");
        require((s.columns <= 1 || copy->stride(1) == 1) && (s.rows <= 1 || copy->stride(0) == s.columns),
                "a copy has to be contiguous");
        s.copy = copy->data();
    }
    s.vectors = int(v.shape(0)), s.v = v.data(), s.of_rows = of_rows.data(), s.row_lengths = row_lengths.data();
    require(int64_t(v.shape(1)) == s.columns, "vectors have to be as long as rows");
    require(of_rows.shape(0) == v.shape(0) && int64_t(of_rows.shape(1)) == s.rows, "sums have to be one per vector and row");
    require(int64_t(row_lengths.shape(0)) == s.rows, "lengths have to be one per row");
    if (q) {
        require(of_columns && column_lengths, "sums of columns have to go somewhere");
        s.by_column = true;
        s.weights = int(q->shape(0)), s.q = q->data();
        s.of_columns = of_columns->data(), s.column_lengths = column_lengths->data();
        require(int64_t(q->shape(1)) == s.rows, "weights have to be as long as columns");
        require(of_columns->shape(0) == q->shape(0) && int64_t(of_columns->shape(1)) == s.columns,
                "sums have to be one per weight and column");
        require(int64_t(column_lengths->shape(0)) == s.columns, "lengths have to be one per column");
    }
    nb::gil_scoped_release release;
    std::vector<float> packed(packed_floats(s));
    std::vector<double> totals(totals_doubles(s));
    s.packed = packed.data(), s.totals = totals.data();
    tempo::active->sums(s);
}

using Pair = std::tuple<int64_t, int64_t>;

// Fills `sums` and `covered`; returns the length of all that is covered.
double taps(const tempo::Array<nb::ndim<4>, nb::c_contig, nb::device::cpu> &x,
            const tempo::Array<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu> &kernel,
            const tempo::Array<float, nb::ndim<4>, nb::c_contig, nb::device::cpu> &sums,
            const Line<const double> &lengths, const Line<double> &covered, Pair stride, Pair padding, Pair dilation,
            bool back) {
    Taps t{};
    t.x = x.data(), t.back = back;
    t.half = tempo::is_bfloat16(x.dtype());
    require(t.half || x.dtype() == nb::dtype<float>(), "maps are float32 or bfloat16");
    t.images = int64_t(x.shape(0)), t.channels = int64_t(x.shape(3)), t.vectors = int(kernel.shape(0));
    require(int64_t(kernel.shape(1)) == t.channels, "vectors have to be as long as pixels");
    require(sums.shape(0) == kernel.shape(0) && int64_t(sums.shape(1)) == t.images, "sums have to be one per vector and image");
    for (int axis = 0; axis < 2; ++axis) {
        t.size[axis] = int64_t(x.shape(1 + axis)), t.out[axis] = int64_t(sums.shape(2 + axis));
        t.taps[axis] = int64_t(kernel.shape(2 + axis));
    }
    std::tie(t.stride[0], t.stride[1]) = stride;
    std::tie(t.padding[0], t.padding[1]) = padding;
    std::tie(t.dilation[0], t.dilation[1]) = dilation;
    require(t.stride[0] > 0 && t.stride[1] > 0, "strides have to be positive");
    const int64_t pixels = t.out[0] * t.out[1], size = t.size[0] * t.size[1], count = t.taps[0] * t.taps[1];
    require(size < INT32_MAX && pixels < INT32_MAX, "maps are too large");
    require(int64_t(lengths.shape(0)) == t.images * size, "lengths have to be one per pixel");
    require(int64_t(covered.shape(0)) == t.images * pixels, "lengths have to be one per pixel of the sums");
    t.kernel = kernel.data(), t.sums = sums.data(), t.lengths = lengths.data(), t.covered = covered.data();
    nb::gil_scoped_release release;
    std::vector<float> packed(tempo::kVectorsAtOnce * tempo::padded(t.channels) * count);
    std::vector<int32_t> meets(count * pixels), order(pixels);
    const std::vector<float> nothing(t.channels);
    t.packed = packed.data(), t.meets = meets.data(), t.order = order.data(), t.nothing = nothing.data();
    return tempo::active->taps(t);
}

using Sheets = tempo::Array<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Lengths = tempo::Array<const double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Ratio, place, residual and tolerance of the worst row, and how many rows could not be checked.
std::tuple<double, int64_t, double, double, int64_t> compare(
    const Sheets &found, const Sheets &expected, const Lengths &lengths, const Line<const double> &other,
    const Lengths &answers, std::tuple<double, double, double, double> error, double drift, double threshold,
    double limit) {
    Comparison c{};
    c.groups = int64_t(found.shape(0)), c.vectors = int(found.shape(1)), c.rows = int64_t(found.shape(2));
    require(c.groups > 0 && c.rows > 0, "there have to be rows");
    for (size_t axis = 0; axis < 3; ++axis)
        require(expected.shape(axis) == found.shape(axis), "there have to be as many sums as expected");
    for (const Lengths *of : {&lengths, &answers})
        require(int64_t(of->shape(0)) == c.groups && int64_t(of->shape(1)) == c.rows, "lengths have to be one per row");
    require(int64_t(other.shape(0)) == c.groups, "lengths have to be one per group");
    c.found = found.data(), c.expected = expected.data();
    c.lengths = lengths.data(), c.answers = answers.data(), c.other = other.data();
    std::tie(c.of_scale, c.of_rounded, c.of_answer, c.lost) = error;
    c.drift = drift, c.threshold = threshold, c.limit = limit;
    {
        nb::gil_scoped_release release;
        tempo::active->compare(c);
    }
    return {c.ratio, c.worst, c.residual, c.tolerance, c.unchecked};
}

using Floats = tempo::Array<float, nb::ndim<2>, nb::device::cpu>;

// `x vᵀ` to `of_rows`, `qᵀ x` to `of_columns`: either may be left out.
void tall_products(const Matrix &x, const std::optional<Lines<const float>> &v, const std::optional<Floats> &of_rows,
                   const std::optional<Floats> &q, const std::optional<Lines<float>> &of_columns) {
    tempo::Tall t{};
    t.x = x.data();
    t.half = tempo::is_bfloat16(x.dtype());
    require(t.half || x.dtype() == nb::dtype<float>(), "a matrix is float32 or bfloat16");
    t.rows = int64_t(x.shape(0)), t.columns = int64_t(x.shape(1)), t.stride = x.stride(0);
    require(t.columns <= 1 || x.stride(1) == 1, "rows have to be contiguous");
    require(bool(v) == bool(of_rows) && bool(q) == bool(of_columns), "products have to go somewhere");
    if (v) {
        t.vectors = int(v->shape(0)), t.v = v->data(), t.of_rows = of_rows->data(), t.rows_stride = of_rows->stride(0);
        require(int64_t(v->shape(1)) == t.columns, "vectors have to be as long as rows");
        require(int64_t(of_rows->shape(0)) == t.rows && of_rows->shape(1) == v->shape(0),
                "products have to be one per row and vector");
        require(t.vectors <= 1 || of_rows->stride(1) == 1, "rows of products have to be contiguous");
    }
    if (q) {
        t.weights = int(q->shape(1)), t.q = q->data(), t.q_stride = q->stride(0), t.of_columns = of_columns->data();
        require(int64_t(q->shape(0)) == t.rows, "weights have to be as long as columns");
        require(of_columns->shape(0) == q->shape(1) && int64_t(of_columns->shape(1)) == t.columns,
                "products have to be one per weight and column");
        require(t.weights <= 1 || q->stride(1) == 1, "rows of weights have to be contiguous");
    }
    nb::gil_scoped_release release;
    std::vector<float> totals(totals_floats(t));
    t.totals = totals.data();
    tempo::active->tall_products(t);
}

}  // namespace

namespace tempo {

void bind_sums(nb::module_ &m) {
    m.def("sums", &::sums, nb::arg("x"), nb::arg("copy").none(), nb::arg("v"), nb::arg("of_rows"),
          nb::arg("row_lengths"), nb::arg("q").none() = nb::none(), nb::arg("of_columns").none() = nb::none(),
          nb::arg("column_lengths").none() = nb::none());
    m.def("compare", &::compare, nb::arg("found"), nb::arg("expected"), nb::arg("lengths"), nb::arg("other"),
          nb::arg("answers"), nb::arg("error"), nb::arg("drift"), nb::arg("threshold"), nb::arg("limit"));
    m.def("taps", &::taps, nb::arg("x"), nb::arg("kernel"), nb::arg("sums"), nb::arg("lengths"), nb::arg("covered"),
          nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"), nb::arg("back"));
    m.def("tall_products", &::tall_products, nb::arg("x"), nb::arg("v").none(), nb::arg("of_rows").none(),
          nb::arg("q").none(), nb::arg("of_columns").none());
}

}  // namespace tempo
