#include <cmath>

#include "bind.h"
#include "mask.h"

namespace {

using tempo::require;
using tempo::Batches;
using tempo::Held;
using tempo::Index;
using tempo::Mask;
using tempo::Matrix;
using tempo::Piece;
using tempo::Sandwich;
using tempo::Scale;
using Array = tempo::Array<>;
using Bias = tempo::Array<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Form = std::tuple<const Mask *, int>;

const Mask &mask_of(const Form &form) {
    require(std::get<0>(form), "a form is of a mask");
    return *std::get<0>(form);
}

std::optional<Held> held(const std::optional<Form> &form, int64_t run, int64_t size) {
    if (!form) return std::nullopt;
    require(run * mask_of(*form).size == size, "a mask has to be as large as the axis it applies to");
    return std::optional<Held>(std::in_place, mask_of(*form), std::get<1>(*form), run);
}

constexpr int64_t kWidest = 1 << 14;  // columns of which a few rows stay in the second-level cache

// Whether axes from `first` on lie in memory like one axis, its elements `stride` apart.
bool like_one(const Array &array, size_t first, int64_t stride) {
    for (size_t axis = array.ndim(); axis-- > first; stride *= array.shape(axis))
        if (array.shape(axis) > 1 && array.stride(axis) != stride) return false;
    return true;
}

// A tensor as a matrix whose rows are contiguous, if it lies like one: of more than two axes, pixels are rows where
// channels lie side by side; else, for `planes`, everything that belongs to an element of the first axis is.
std::optional<Matrix> matrix_of(const Array &array, int64_t plane, bool planes) {
    const bool half = tempo::is_bfloat16(array.dtype());
    if (array.device_type() != nb::device::cpu::value || !(half || array.dtype() == nb::dtype<float>())) return {};
    const int64_t rows = array.shape(0), channels = array.shape(1);
    if (planes) {
        if (plane * channels > kWidest || !like_one(array, 1, 1)) return {};
        return Matrix{array.data(), rows, channels * plane, array.stride(0), half};
    }
    int64_t stride = rows > 1 ? array.stride(0) : channels;  // of the innermost pixels
    for (size_t axis = 2; axis < array.ndim(); ++axis)
        if (array.shape(axis) > 1) stride = array.stride(axis);
    const bool side_by_side = channels <= 1 || array.stride(1) == 1;
    if (!side_by_side || !like_one(array, 2, stride) || (rows > 1 && array.stride(0) != stride * plane)) return {};
    return Matrix{array.data(), rows * plane, channels, stride, half};
}

using Vectors = tempo::Array<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WatchedSums = tempo::Array<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Lengths = tempo::Array<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Watching = std::tuple<Vectors, WatchedSums, Lengths>;
using Added = std::tuple<Vectors, Vectors>;
// Vectors, sums and lengths of rows; and weights, sums and lengths of columns.
using Tallying = std::tuple<Vectors, WatchedSums, Lengths, std::optional<std::tuple<Vectors, WatchedSums, Lengths>>>;

tempo::Watch watch_of(const Vectors &v, const WatchedSums &sums, const Lengths &lengths, const Matrix &of) {
    require(v.shape(0) <= tempo::kMostWatched && int64_t(v.shape(1)) == of.columns,
            "vectors have to be as long as rows, and not too many");
    require(sums.shape(0) == v.shape(0) && int64_t(sums.shape(1)) == of.rows, "sums have to be one per vector and row");
    require(int64_t(lengths.shape(0)) == of.rows, "lengths have to be one per row");
    return {int(v.shape(0)), v.data(), sums.data(), lengths.data(), true, 0.0f};
}

bool in_range(const tempo::Watch &watch) { return watch.finite && watch.longest > 0x1p-80f; }

// Whether sums were made of what was read, and of what was written, with all squares within float's range. Nothing, if
// this is not for kernels: other dtypes, tensors elsewhere, or such that do not lie in memory as matrices do.
std::optional<std::tuple<bool, bool>> sandwich(const Array &x, const std::optional<Form> &rows,
              const std::optional<Form> &columns, const std::vector<Array> &outs, int axis,
              const std::vector<std::optional<Bias>> &biases, const std::optional<Watching> &watching,
              const std::optional<Added> &plus, const std::optional<Tallying> &tallying) {
    require(x.ndim() >= 2, "a matrix has two axes");
    require(biases.empty() || biases.size() == outs.size(), "biases have to be as many as outputs");
    require(axis == 0 || axis == 1, "outputs lie along axis 0 or 1");
    const bool maps = x.ndim() > 2;
    if (columns && maps && mask_of(*columns).size != int64_t(x.shape(1))) return {};  // channels of one group
    int64_t plane = 1;
    for (size_t i = 2; i < x.ndim(); ++i) plane *= x.shape(i);
    std::vector<Matrix> found;
    const auto lies = [&](bool planes) {
        found.clear();
        for (size_t i = 0; i <= outs.size(); ++i) {
            const Array &array = i ? outs[i - 1] : x;
            require(array.ndim() == x.ndim(), "outputs have as many axes as what they are of");
            for (size_t k = 2; k < x.ndim(); ++k) require(array.shape(k) == x.shape(k), "maps are all of one size");
            const auto matrix = matrix_of(array, plane, planes);
            if (!matrix) return false;
            found.push_back(*matrix);
        }
        return true;
    };
    const bool planes = !lies(false);
    if (planes && !(maps && !plus && (rows || columns) && lies(true))) return {};
    const Matrix from = found[0];
    require(from.columns < INT32_MAX && from.rows < INT32_MAX, "a matrix is too large");
    // What moves together: a row's pixels, or a column's.
    const int64_t run = planes ? plane : 1;
    const auto row_operator = held(rows, plane / run, from.rows), column_operator = held(columns, run, from.columns);
    std::vector<Piece> pieces;
    std::vector<std::vector<float>> spread(biases.size());
    int64_t row = 0, column = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
        const Matrix &to = found[i + 1];
        require(axis == 1 ? to.rows == from.rows : to.columns == from.columns,
                "outputs have to be pieces of the result");
        const float *bias = i < biases.size() && biases[i] ? biases[i]->data() : nullptr;
        require(!bias || int64_t(biases[i]->shape(0)) * run == to.columns, "a bias has to be as long as its columns");
        if (bias && run > 1) {
            for (int64_t k = 0; k < to.columns; ++k) spread[i].push_back(bias[k / run]);
            bias = spread[i].data();
        }
        pieces.push_back({to, row, column, bias});
        (axis ? column : row) += axis ? to.columns : to.rows;
    }
    require(axis == 1 ? column == from.columns : row == from.rows, "outputs have to make up the result");
    tempo::Watch watch{};
    if (watching && !planes) {
        const auto &[v, sums, lengths] = *watching;
        watch = watch_of(v, sums, lengths, from);
    }
    tempo::Addend addend;
    if (plus) {
        const auto &[left, right] = *plus;
        require(int64_t(left.shape(0)) == from.rows && int64_t(right.shape(1)) == from.columns &&
                    left.shape(1) == right.shape(0),
                "factors have to make up a matrix like the result");
        addend = {int(left.shape(1)), left.data(), right.data()};
    }
    tempo::Tally tally{};
    std::vector<float> recent;
    std::vector<double> totals;
    if (tallying && !planes) {
        const auto &[v, sums, lengths, by_column] = *tallying;
        require(outs.size() == 1 && !plus && !pieces[0].bias,
                "what is summed has to be one piece, with nothing added to it");
        tally.rows = watch_of(v, sums, lengths, from);
        if (by_column) {
            const auto &[q, of_columns, column_lengths] = *by_column;
            require(q.shape(0) > 0 && q.shape(0) <= 8 && int64_t(q.shape(1)) == from.rows,
                    "weights have to be as long as columns, at most 8");
            require(of_columns.shape(0) == q.shape(0) && int64_t(of_columns.shape(1)) == from.columns &&
                        int64_t(column_lengths.shape(0)) == from.columns,
                    "sums have to be one per weight and column");
            tally.weights = int(q.shape(0)), tally.q = q.data();
            recent.resize((tally.weights + 1) * tempo::padded(from.columns));
            totals.resize(recent.size());
            tally.recent = recent.data(), tally.totals = totals.data();
        }
    }
    const Sandwich whole{from,
                         row_operator ? &row_operator->op : nullptr,
                         column_operator ? &column_operator->op : nullptr,
                         pieces.data(),
                         int(pieces.size()),
                         addend,
                         watching && !planes ? &watch : nullptr,
                         tallying && !planes ? &tally : nullptr};
    nb::gil_scoped_release release;
    tempo::active->sandwich(whole);
    for (int64_t column = 0; tally.weights && column < from.columns; ++column) {
        const auto &[q, of_columns, column_lengths] = *std::get<3>(*tallying);
        const double *total = totals.data() + column;
        for (int k = 0; k < tally.weights; ++k, total += tempo::padded(from.columns))
            of_columns.data()[k * from.columns + column] = float(*total);
        column_lengths.data()[column] = std::sqrt(*total);
    }
    return std::tuple{in_range(watch), in_range(tally.rows)};
}

}  // namespace

namespace tempo {

void bind_sandwich(nb::module_ &m) {
    nb::class_<Mask>(m, "Mask")
        .def(nb::init<const std::vector<Index> &, const std::optional<Scale> &, std::vector<Batches>,
                      std::vector<Batches>>(),
             nb::arg("gathers"), nb::arg("scale").none(), nb::arg("blocks"), nb::arg("inverses"));
    m.def("sandwich", &::sandwich, nb::arg("x"), nb::arg("rows").none(), nb::arg("columns").none(), nb::arg("outs"),
          nb::arg("axis"), nb::arg("biases"), nb::arg("watch").none() = nb::none(), nb::arg("plus").none() = nb::none(),
          nb::arg("tally").none() = nb::none());
}

}  // namespace tempo
