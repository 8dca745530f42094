#include <cmath>

#include "bind.h"

namespace {

using tempo::require;
using tempo::Block;
using tempo::Matrices;
using tempo::Operator;
using tempo::Piece;
using tempo::Sandwich;
using Array = tempo::Array<nb::device::cpu>;
using Index = tempo::Array<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Scale = tempo::Array<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Squares = tempo::Array<const float, nb::ndim<3>, nb::device::cpu>;  // (count, side, side), any strides
using Rounds = std::vector<std::vector<Squares>>;

Matrices matrices_of(const Array &array) {
    require(array.ndim() == 3, "a batch of matrices has three axes");
    require(array.shape(2) <= 1 || array.stride(2) == 1, "rows of matrices have to be contiguous");
    const bool half = tempo::is_bfloat16(array.dtype());
    require(half || array.dtype() == nb::dtype<float>(), "matrices are float32 or bfloat16");
    return {array.data(),           int64_t(array.shape(0)), int64_t(array.shape(1)), int64_t(array.shape(2)),
            array.stride(0),        array.stride(1),         half};
}

// An operator, and the memory that it points to.
struct Held {
    Operator op;
    std::vector<Index> gathers;
    std::vector<const int32_t *> pointers;
    std::vector<int32_t> inverse;
    std::vector<std::vector<Block>> blocks;
    std::vector<const Block *> first;
    std::vector<int> counts;

    Held(std::vector<Index> indices, const std::optional<Scale> &scale, const Rounds &rounds, int64_t size)
        : gathers(std::move(indices)) {
        require(gathers.size() == rounds.size() + 1, "an operator has one gather more than rounds of blocks");
        require(!scale || rounds.empty(), "an operator has scales or blocks, not both");
        require(!scale || int64_t(scale->shape(0)) == size, "scales have to be as many as elements");
        for (const Index &gather : gathers) {
            require(int64_t(gather.shape(0)) == size, "an operator has to be as large as the axis it applies to");
            std::vector<bool> seen(size);  // also keeps every index in bounds
            for (int64_t i = 0; i < size; ++i) {
                const int32_t to = gather.data()[i];
                require(to >= 0 && to < size && !seen[to], "a gather has to be a permutation");
                seen[to] = true;
            }
            pointers.push_back(gather.data());
        }
        inverse.resize(size);
        for (int64_t i = 0; i < size; ++i) inverse[pointers.back()[i]] = int32_t(i);
        place(rounds, size);
        op.size = int(size);
        op.rounds = int(rounds.size());
        op.gathers = pointers.data();
        op.last_inverse = inverse.data();
        op.scale = scale ? scale->data() : nullptr;
        op.blocks = first.data();
        op.counts = counts.data();
    }
    Held(const Held &) = delete;

    void place(const Rounds &rounds, int64_t size) {
        for (const auto &batches : rounds) {
            std::vector<Block> found;
            int64_t start = 0;
            for (const Squares &squares : batches) {
                const int64_t side = int64_t(squares.shape(1));
                require(int64_t(squares.shape(2)) == side, "blocks have to be square");
                for (size_t b = 0; b < squares.shape(0); ++b, start += side)
                    found.push_back({int(start), int(side), squares.stride(2), squares.stride(1),
                                     squares.data() + int64_t(b) * squares.stride(0)});
            }
            require(start == size, "blocks have to be as large as the axis they apply to, together");
            blocks.push_back(std::move(found));
        }
        for (const auto &found : blocks) {
            first.push_back(found.data());
            counts.push_back(int(found.size()));
        }
    }
};

using Given = std::tuple<std::vector<Index>, std::optional<Scale>, Rounds>;

std::optional<Held> held(const std::optional<Given> &given, int64_t size) {
    return given ? std::optional<Held>(std::in_place, std::get<0>(*given), std::get<1>(*given), std::get<2>(*given),
                                       size)
                 : std::nullopt;
}

using Vectors = tempo::Array<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WatchedSums = tempo::Array<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Lengths = tempo::Array<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Watching = std::tuple<Vectors, WatchedSums, Lengths>;
using Added = std::tuple<Vectors, Vectors>;
// Vectors, sums and lengths of rows; and weights, sums and lengths of columns.
using Tallying = std::tuple<Vectors, WatchedSums, Lengths, std::optional<std::tuple<Vectors, WatchedSums, Lengths>>>;

tempo::Watch watch_of(const Vectors &v, const WatchedSums &sums, const Lengths &lengths, const Matrices &of) {
    require(of.batch == 1, "only the rows of a single matrix can be watched");
    require(v.shape(0) <= tempo::kMostWatched && int64_t(v.shape(1)) == of.columns,
            "vectors have to be as long as rows, and not too many");
    require(sums.shape(0) == v.shape(0) && int64_t(sums.shape(1)) == of.rows, "sums have to be one per vector and row");
    require(int64_t(lengths.shape(0)) == of.rows, "lengths have to be one per row");
    return {int(v.shape(0)), v.data(), sums.data(), lengths.data(), true, 0.0f};
}

bool in_range(const tempo::Watch &watch) { return watch.finite && watch.longest > 0x1p-80f; }

// Of what was watched and of what was tallied: true if that was nothing, or all its squares are within float's range.
std::tuple<bool, bool> sandwich(const Array &x, const std::optional<Given> &rows, const std::optional<Given> &columns,
              const std::vector<Array> &outs, int axis, const std::vector<std::optional<Scale>> &biases,
              const std::optional<Watching> &watching, const std::optional<Added> &plus,
              const std::optional<Tallying> &tallying) {
    const Matrices from = matrices_of(x);
    require(from.columns < INT32_MAX && from.rows < INT32_MAX, "a matrix is too large");
    require(biases.size() == outs.size(), "biases have to be as many as outputs");
    require(axis == 0 || axis == 1, "outputs lie along axis 0 or 1");
    const auto row_operator = held(rows, from.rows), column_operator = held(columns, from.columns);
    std::vector<Piece> pieces;
    int64_t row = 0, column = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
        const Matrices to = matrices_of(outs[i]);
        require(to.batch == from.batch, "outputs have to be as many matrices as there are");
        require(axis == 1 ? to.rows == from.rows : to.columns == from.columns,
                "outputs have to be pieces of the result");
        require(!biases[i] || int64_t(biases[i]->shape(0)) == to.columns, "a bias has to be as long as its columns");
        pieces.push_back({to, row, column, biases[i] ? biases[i]->data() : nullptr});
        (axis ? column : row) += axis ? to.columns : to.rows;
    }
    require(axis == 1 ? column == from.columns : row == from.rows, "outputs have to make up the result");
    tempo::Watch watch{};
    if (watching) {
        const auto &[v, sums, lengths] = *watching;
        watch = watch_of(v, sums, lengths, from);
    }
    tempo::Addend addend;
    if (plus) {
        const auto &[left, right] = *plus;
        require(from.batch == 1, "only to a single matrix can another be added");
        require(int64_t(left.shape(0)) == from.rows && int64_t(right.shape(1)) == from.columns &&
                    left.shape(1) == right.shape(0),
                "factors have to make up a matrix like the result");
        addend = {int(left.shape(1)), left.data(), right.data()};
    }
    tempo::Tally tally{};
    std::vector<float> recent;
    std::vector<double> totals;
    if (tallying) {
        const auto &[v, sums, lengths, by_column] = *tallying;
        require(outs.size() == 1 && !plus && !biases[0], "what is summed has to be one piece, with nothing added to it");
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
                         watching ? &watch : nullptr,
                         tallying ? &tally : nullptr};
    nb::gil_scoped_release release;
    tempo::active->sandwich(whole);
    for (int64_t column = 0; tally.weights && column < from.columns; ++column) {
        const auto &[q, of_columns, column_lengths] = *std::get<3>(*tallying);
        const double *total = totals.data() + column;
        for (int k = 0; k < tally.weights; ++k, total += tempo::padded(from.columns))
            of_columns.data()[k * from.columns + column] = float(*total);
        column_lengths.data()[column] = std::sqrt(*total);
    }
    return {!watching || in_range(watch), !tallying || in_range(tally.rows)};
}

}  // namespace

namespace tempo {

void bind_sandwich(nb::module_ &m) {
    m.def("sandwich", &::sandwich, nb::arg("x"), nb::arg("rows").none(), nb::arg("columns").none(), nb::arg("outs"),
          nb::arg("axis"), nb::arg("biases"), nb::arg("watch").none() = nb::none(), nb::arg("plus").none() = nb::none(),
          nb::arg("tally").none() = nb::none());
}

}  // namespace tempo
