#include <cmath>

#include "bind.h"

namespace {

using tempo::require;
using tempo::Block;
using tempo::Matrix;
using tempo::Operator;
using tempo::Piece;
using tempo::Sandwich;
using Array = tempo::Array<nb::device::cpu>;
using Index = tempo::Array<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Scale = tempo::Array<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Squares = tempo::Array<const float, nb::ndim<3>, nb::device::cpu>;  // (count, side, side), any strides
using Rounds = std::vector<std::vector<Squares>>;

Matrix matrix_of(const Array &array) {
    require(array.ndim() == 2, "a matrix has two axes");
    require(array.shape(1) <= 1 || array.stride(1) == 1, "rows of a matrix have to be contiguous");
    const bool half = tempo::is_bfloat16(array.dtype());
    require(half || array.dtype() == nb::dtype<float>(), "matrices are float32 or bfloat16");
    return {array.data(), int64_t(array.shape(0)), int64_t(array.shape(1)), array.stride(0), half};
}

// An operator, and the memory that it points to. Applied to `size` elements, runs of `run` of them move together: to
// each place in a run the operator applies by itself.
struct Held {
    Operator op;
    std::vector<Index> gathers;
    std::vector<const int32_t *> pointers;
    std::vector<int32_t> inverse;
    std::vector<std::vector<int32_t>> expanded;
    std::vector<float> scales;
    std::vector<std::vector<Block>> blocks;
    std::vector<const Block *> first;
    std::vector<int> counts;

    Held(std::vector<Index> indices, const std::optional<Scale> &scale, const Rounds &rounds, int64_t run, int64_t size)
        : gathers(std::move(indices)) {
        require(gathers.size() == rounds.size() + 1, "an operator has one gather more than rounds of blocks");
        require(!scale || rounds.empty(), "an operator has scales or blocks, not both");
        require(run > 0 && size % run == 0, "an axis has to consist of whole runs");
        const int64_t own = size / run;
        require(!scale || int64_t(scale->shape(0)) == own, "scales have to be as many as elements");
        for (const Index &gather : gathers) {
            require(int64_t(gather.shape(0)) == own, "an operator has to be as large as the axis it applies to");
            std::vector<bool> seen(own);  // also keeps every index in bounds
            for (int64_t i = 0; i < own; ++i) {
                const int32_t to = gather.data()[i];
                require(to >= 0 && to < own && !seen[to], "a gather has to be a permutation");
                seen[to] = true;
            }
            pointers.push_back(gather.data());
        }
        place(rounds, run, own);
        if (run > 1) expand(rounds, run, own);
        inverse.resize(size);
        for (int64_t i = 0; i < size; ++i) inverse[pointers.back()[i]] = int32_t(i);
        op.size = int(size);
        op.rounds = int(rounds.size());
        op.gathers = pointers.data();
        op.last_inverse = inverse.data();
        op.scale = scale ? (run > 1 ? spread(*scale, run) : scale->data()) : nullptr;
        op.blocks = first.data();
        op.counts = counts.data();
    }
    Held(const Held &) = delete;

    // Blocks where they lie, each as often as a run is long.
    void place(const Rounds &rounds, int64_t run, int64_t size) {
        for (const auto &batches : rounds) {
            std::vector<Block> found;
            int64_t start = 0;
            for (const Squares &squares : batches) {
                const int64_t count = int64_t(squares.shape(0)), side = int64_t(squares.shape(1));
                require(int64_t(squares.shape(2)) == side, "blocks have to be square");
                for (int64_t b = 0; b < run * count; ++b, start += side)
                    found.push_back({int(start), int(side), squares.stride(2), squares.stride(1),
                                     squares.data() + b % count * squares.stride(0)});
            }
            require(start == run * size, "blocks have to be as large as the axis they apply to, together");
            blocks.push_back(std::move(found));
        }
        for (const auto &found : blocks) {
            first.push_back(found.data());
            counts.push_back(int(found.size()));
        }
    }

    // Where elements are before a round of blocks, batches of `squares` one after the other, and in each the places of a
    // run; without any, the places of each element together, as they are given.
    static std::vector<int64_t> places(const std::vector<Squares> *squares, int64_t run, int64_t size) {
        std::vector<int64_t> at(size * run);
        int64_t start = 0;
        const auto fill = [&](int64_t count) {
            for (int64_t i = 0; i < count; ++i)
                for (int64_t r = 0; r < run; ++r) at[(start + i) * run + r] = start * run + r * count + i;
            start += count;
        };
        for (size_t b = 0; squares && b < squares->size(); ++b) fill((*squares)[b].shape(0) * (*squares)[b].shape(1));
        while (!squares && start < size) fill(1);
        return at;
    }

    // The gathers of all elements.
    void expand(const Rounds &rounds, int64_t run, int64_t size) {
        std::vector<int64_t> from = places(nullptr, run, size);
        for (size_t round = 0; round < pointers.size(); ++round) {
            std::vector<int64_t> to = places(round < rounds.size() ? &rounds[round] : nullptr, run, size);
            std::vector<int32_t> index(size * run);
            for (int64_t i = 0; i < size; ++i)
                for (int64_t r = 0; r < run; ++r)
                    index[to[i * run + r]] = int32_t(from[int64_t(pointers[round][i]) * run + r]);
            expanded.push_back(std::move(index));
            from = std::move(to);
        }
        for (size_t round = 0; round < pointers.size(); ++round) pointers[round] = expanded[round].data();
    }

    const float *spread(const Scale &scale, int64_t run) {
        for (size_t i = 0; i < scale.shape(0); ++i) scales.insert(scales.end(), run, scale.data()[i]);
        return scales.data();
    }
};

using Given = std::tuple<std::vector<Index>, std::optional<Scale>, Rounds, int64_t>;

std::optional<Held> held(const std::optional<Given> &given, int64_t size) {
    if (!given) return std::nullopt;
    const auto &[gathers, scale, rounds, run] = *given;
    return std::optional<Held>(std::in_place, gathers, scale, rounds, run, size);
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

// Of what was watched and of what was tallied: true if that was nothing, or all its squares are within float's range.
std::tuple<bool, bool> sandwich(const Array &x, const std::optional<Given> &rows, const std::optional<Given> &columns,
              const std::vector<Array> &outs, int axis, const std::vector<std::optional<Scale>> &biases,
              const std::optional<Watching> &watching, const std::optional<Added> &plus,
              const std::optional<Tallying> &tallying) {
    const Matrix from = matrix_of(x);
    require(from.columns < INT32_MAX && from.rows < INT32_MAX, "a matrix is too large");
    require(biases.size() == outs.size(), "biases have to be as many as outputs");
    require(axis == 0 || axis == 1, "outputs lie along axis 0 or 1");
    const auto row_operator = held(rows, from.rows), column_operator = held(columns, from.columns);
    std::vector<Piece> pieces;
    int64_t row = 0, column = 0;
    for (size_t i = 0; i < outs.size(); ++i) {
        const Matrix to = matrix_of(outs[i]);
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
