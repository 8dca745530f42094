// A mask as it comes in from Python, and its forms as operators.
#pragma once

#include "bind.h"

namespace tempo {

using Index = tempo::Array<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Scale = tempo::Array<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Squares = tempo::Array<const float, nb::ndim<3>, nb::device::cpu>;  // (count, side, side), any strides
using Batches = std::vector<Squares>;

// A mask in its forms, which are numbered as in `tempo.schemes.masks`: the first bit is for the inverse, the second for
// the transpose. Both or none of them keep the order of gathers.
struct Mask {
    int64_t size;
    std::vector<std::vector<int32_t>> gathers[2];  // and those that undo them, last first
    std::vector<float> scales[4];                  // of each form; empty: all ones
    std::vector<Batches> rounds[2];                // of blocks, and of their inverses

    Mask(const std::vector<Index> &given, const std::optional<Scale> &scale, std::vector<Batches> blocks,
         std::vector<Batches> inverses)
        : rounds{std::move(blocks), std::move(inverses)} {
        require(given.size() == rounds[0].size() + 1 && rounds[0].size() == rounds[1].size(),
                "a mask has one gather more than rounds of blocks, and as many of their inverses");
        size = int64_t(given[0].shape(0));
        for (const Index &gather : given) {
            require(int64_t(gather.shape(0)) == size, "gathers of a mask are all of one size");
            std::vector<int32_t> forth(gather.data(), gather.data() + size), back(size, -1);
            for (int64_t i = 0; i < size; ++i) {
                require(forth[i] >= 0 && forth[i] < size && back[forth[i]] < 0, "a gather has to be a permutation");
                back[forth[i]] = int32_t(i);
            }
            gathers[0].push_back(std::move(forth));
            gathers[1].insert(gathers[1].begin(), std::move(back));
        }
        for (const auto &all : rounds)
            for (const Batches &batches : all) {
                int64_t together = 0;
                for (const Squares &squares : batches) {
                    require(squares.shape(1) == squares.shape(2), "blocks have to be square");
                    together += int64_t(squares.shape(0) * squares.shape(1));
                }
                require(together == size, "blocks have to be as large as the axis they apply to, together");
            }
        if (!scale) return;
        require(rounds[0].empty(), "a mask has scales or blocks, not both");
        require(int64_t(scale->shape(0)) == size, "scales have to be as many as elements");
        for (auto &of_form : scales) of_form.resize(size);
        for (int64_t i = 0; i < size; ++i) {
            const double s = scale->data()[i];
            scales[0][i] = scales[2][gathers[0][0][i]] = float(s);
            scales[3][i] = scales[1][gathers[0][0][i]] = float(1 / s);
        }
    }
};

// A form of a mask as an operator, and the memory that it points to. Runs of `run` elements move together: to each place
// in a run the operator applies by itself.
struct Held {
    Operator op;
    std::vector<const int32_t *> pointers;
    std::vector<int32_t> inverse;
    std::vector<std::vector<int32_t>> expanded;
    std::vector<float> scales;
    std::vector<const Batches *> rounds;
    std::vector<std::vector<Block>> blocks;
    std::vector<const Block *> first;
    std::vector<int> counts;

    Held(const Mask &mask, int form, int64_t run) {
        require(form >= 0 && form < 4, "a mask has four forms");
        const bool inverted = form & 1, transposed = form & 2, backwards = inverted != transposed;
        for (const auto &gather : mask.gathers[backwards]) pointers.push_back(gather.data());
        for (const Batches &batches : mask.rounds[inverted])
            rounds.insert(backwards ? rounds.begin() : rounds.end(), &batches);
        place(run, transposed);
        op.last_inverse = mask.gathers[!backwards].front().data();
        if (run > 1) expand(run, mask.size);
        const auto &scale = mask.scales[form];
        op.scale = scale.empty() ? nullptr : scale.data();
        if (op.scale && run > 1) {
            scales.reserve(run * scale.size());
            for (const float s : scale) scales.insert(scales.end(), run, s);
            op.scale = scales.data();
        }
        op.size = int(run * mask.size);
        op.rounds = int(rounds.size());
        op.gathers = pointers.data();
        op.blocks = first.data();
        op.counts = counts.data();
    }
    Held(const Held &) = delete;

    // Blocks where they lie, each as often as a run is long.
    void place(int64_t run, bool transposed) {
        for (const Batches *batches : rounds) {
            std::vector<Block> found;
            int64_t start = 0;
            for (const Squares &squares : *batches) {
                const int64_t count = int64_t(squares.shape(0)), side = int64_t(squares.shape(1));
                for (int64_t b = 0; b < run * count; ++b, start += side)
                    found.push_back({int(start), int(side), squares.stride(transposed ? 1 : 2),
                                     squares.stride(transposed ? 2 : 1),
                                     squares.data() + b % count * squares.stride(0)});
            }
            blocks.push_back(std::move(found));
        }
        for (const auto &found : blocks) {
            first.push_back(found.data());
            counts.push_back(int(found.size()));
        }
    }

    // Where an element's run is: its first place, and how far it is from one to the next.
    struct Place {
        int64_t first, step;
    };

    // Before a round of blocks: batches one after the other, and in each the places of a run. Without any, the places of
    // each element together, as they are given.
    static std::vector<Place> places(const Batches *batches, int64_t run, int64_t size) {
        std::vector<Place> at(size);
        if (!batches) {
            for (int64_t i = 0; i < size; ++i) at[i] = {i * run, 1};
            return at;
        }
        int64_t start = 0;
        for (const Squares &squares : *batches) {
            const int64_t count = squares.shape(0) * squares.shape(1);
            for (int64_t i = 0; i < count; ++i) at[start + i] = {start * run + i, count};
            start += count;
        }
        return at;
    }

    // The gathers of all elements.
    void expand(int64_t run, int64_t size) {
        std::vector<Place> from = places(nullptr, run, size);
        for (size_t round = 0; round < pointers.size(); ++round) {
            std::vector<Place> to = places(round < rounds.size() ? rounds[round] : nullptr, run, size);
            std::vector<int32_t> index(size * run);
            for (int64_t i = 0; i < size; ++i) {
                const Place here = to[i], there = from[pointers[round][i]];
                for (int64_t r = 0; r < run; ++r)
                    index[here.first + r * here.step] = int32_t(there.first + r * there.step);
            }
            expanded.push_back(std::move(index));
            from = std::move(to);
        }
        for (size_t round = 0; round < pointers.size(); ++round) pointers[round] = expanded[round].data();
        if (rounds.empty()) return;  // nothing else asks for it
        inverse.resize(size * run);
        for (int64_t i = 0; i < size * run; ++i) inverse[pointers.back()[i]] = int32_t(i);
        op.last_inverse = inverse.data();
    }
};

}  // namespace tempo
