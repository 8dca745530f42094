// Applies an operator to rows and one to columns in one pass over memory (one more for each further round of rows).
//
// A tile of rows is transposed into scratch memory, so that vectors run over rows and a column is a line. There, picking
// columns in any order costs nothing, since whole lines are read; a block of rows multiplies each line, a block of
// columns combines lines. On the way out the tile is transposed back.
#pragma once

#include <type_traits>

#include "sandwich_types.h"
#include "simd.h"
#include "watch.h"

namespace tempo::TEMPO_ISA {

constexpr int kParts = kLine / kLanes;

constexpr int kTogether = kLanes == kLine ? 2 * kLine : kLine;  // lanes for which columns are mixed at a time
constexpr int kChunk = 256;  // columns whose rows are mixed at a time: whole lines of memory, in the second-level cache

struct Tile {
    int rows;             // that are real
    int lanes;            // rows rounded up to whole vectors
    const int32_t *from;  // rows of the source
    const int32_t *to;    // rows of the target
};

// A transposed tile: for every column a line of lanes, in panels of as many lanes as a cache line holds.
struct Lines {
    float *data;
    int64_t panel;   // from one panel to the next
    float *at(int lane) const { return data + (lane / kLine) * panel + lane % kLine; }
};

// Rows of the source that are read next. They are fetched into the second-level cache a line at a time, between what is
// computed and written meanwhile: they lie anywhere, so the processor cannot foresee them.
struct NextRows {
    const char *data = nullptr;
    int64_t stride = 0;  // in bytes
    int element = 0;     // in bytes
    const int32_t *rows = nullptr;
    int count = 0;
    [[gnu::always_inline]] void fetch(int row, int column) const {  // else GCC finds no effect, and drops calls
        if (row < count) __builtin_prefetch(data + rows[row] * stride + int64_t(column) * element, 0, 2);
    }
};

inline int rounded(int rows, int to) { return (rows + to - 1) / to * to; }

// --- in: line i of a panel becomes column i of `rows`, of which `used` count ---

template <typename T>
void read_panel(const T *const (&rows)[kLine], int used, int width, float *lines) {
    int column = 0;
    for (; column + kLine <= width; column += kLine)
        for (int lane = 0; lane < used; lane += kLanes)
            for (int part = 0; part < kParts; ++part) {
                Vector v[kLanes];
                const int at = column + part * kLanes;
                for (int i = 0; i < kLanes; ++i) v[i] = load(rows[lane + i] + at);
                transpose(v);
                for (int i = 0; i < kLanes; ++i) store(lines + (at + i) * kLine + lane, v[i]);
            }
    for (; column < width; ++column)
        for (int i = 0; i < used; ++i) lines[column * kLine + i] = widen(rows[i][column]);
}

template <typename T>
void read_tile(const T *x, int64_t stride, int width, const Tile &tile, const Lines &lines) {
    for (int panel = 0; panel < tile.lanes; panel += kLine) {
        const int used = least(kLine, tile.lanes - panel);
        const T *rows[kLine] = {};
        for (int i = 0; i < used; ++i) rows[i] = x + tile.from[least(panel + i, tile.rows - 1)] * stride;
        read_panel(rows, used, width, lines.at(panel));
    }
}

// A chunk's columns of a tile's rows, one row after the other.
template <typename T>
void read_chunk(const T *x, int64_t stride, int first, int width, const Tile &tile, float *chunk) {
    for (int i = 0; i < tile.rows; ++i, chunk += kChunk) {
        const T *row = x + tile.from[i] * stride + first;
        int column = 0;
        for (; column + kLanes <= width; column += kLanes) store(chunk + column, load(row + column));
        for (; column < width; ++column) chunk[column] = widen(row[column]);
    }
}

// --- products with blocks: two vectors by up to six sums at a time, as many as there are registers for ---

// Calls `f` with a compile-time count, in steps that leave no single one where that can be helped.
template <typename F>
inline void by_six(int count, const F &f) {
    int done = 0;
    while (done < count) {
        switch (const int left = count - done; left == 8 || left == 4 ? 4 : least(left, 6)) {
            case 6: f(std::integral_constant<int, 6>{}, done), done += 6; break;
            case 5: f(std::integral_constant<int, 5>{}, done), done += 5; break;
            case 4: f(std::integral_constant<int, 4>{}, done), done += 4; break;
            case 3: f(std::integral_constant<int, 3>{}, done), done += 3; break;
            case 2: f(std::integral_constant<int, 2>{}, done), done += 2; break;
            default: f(std::integral_constant<int, 1>{}, done), done += 1; break;
        }
    }
}

template <typename F>
inline void by_two_vectors(int lanes, const F &f) {
    int lane = 0;
    for (; lane + 2 * kLanes <= lanes; lane += 2 * kLanes) f(std::integral_constant<int, 2>{}, lane);
    if (lane < lanes) f(std::integral_constant<int, 1>{}, lane);
}

// A block of rows, on a chunk, while the next one is fetched.
inline void mix_rows(const Block &block, const float *from, float *to, int width, const NextRows &next) {
    by_two_vectors(rounded(width, kLanes), [&](auto vectors, int column) {
        by_six(block.side, [&](auto outputs, int output) {
            constexpr int kVectors = decltype(vectors)::value, kOutputs = decltype(outputs)::value;
            Vector total[kOutputs][kVectors] = {};
            const float *row = from + column, *weights = block.values + output * block.to;
            for (int o = 0; o < kOutputs; ++o)  // each group of outputs its share of the rows
                for (int at = 0; at < kVectors * kLanes; at += kLine) next.fetch(output + o, column + at);
            for (int k = 0; k < block.side; ++k, row += kChunk, weights += block.from) {
                Vector x[kVectors];
                for (int v = 0; v < kVectors; ++v) x[v] = load(row + v * kLanes);
                for (int o = 0; o < kOutputs; ++o) {
                    const Vector w = broadcast(weights[o * block.to]);
                    for (int v = 0; v < kVectors; ++v) total[o][v] += w * x[v];
                }
            }
            for (int o = 0; o < kOutputs; ++o)
                for (int v = 0; v < kVectors; ++v)
                    store(to + (output + o) * kChunk + column + v * kLanes, total[o][v]);
        });
    });
}

// A block of columns: every line becomes a sum of lines.
inline void mix_columns(const Block &block, const int32_t *index, const Lines &from, const Lines &to, int lanes) {
    by_two_vectors(lanes, [&](auto vectors, int lane) {
        constexpr int kVectors = decltype(vectors)::value;
        const float *lines[kVectors];
        for (int v = 0; v < kVectors; ++v) lines[v] = from.at(lane + v * kLanes);
        by_six(block.side, [&](auto outputs, int output) {
            constexpr int kOutputs = decltype(outputs)::value;
            Vector total[kOutputs][kVectors] = {};
            const float *weights = block.values + output * block.to;
            for (int k = 0; k < block.side; ++k, weights += block.from) {
                Vector x[kVectors];
                for (int v = 0; v < kVectors; ++v) x[v] = load(lines[v] + int64_t(index[k]) * kLine);
                for (int o = 0; o < kOutputs; ++o) {
                    const Vector w = broadcast(weights[o * block.to]);
                    for (int v = 0; v < kVectors; ++v) total[o][v] += w * x[v];
                }
            }
            for (int v = 0; v < kVectors; ++v) {
                float *line = to.at(lane + v * kLanes) + (block.start + output) * kLine;
                for (int o = 0; o < kOutputs; ++o) store(line + o * kLine, total[o][v]);
            }
        });
    });
}

// --- out: piece[to[lane]][column] = lines[index[column]][lane] · scales + bias + left[to[lane]] · right[.][column] ---

template <typename T>
void write_tile(const Lines &lines, const Tile &tile, const Operator *columns, const Piece &piece, const Addend &plus,
                Tally *tally, const float *packed, int64_t of_right, const float *row_scale,
                const NextRows &next, bool past_caches) {
    const int32_t *index = columns ? columns->gathers[columns->rounds] + piece.column : nullptr;
    const float *column_scale = columns && columns->scale ? columns->scale + piece.column : nullptr;
    T *out = static_cast<T *>(piece.to.data);
    const int width = int(piece.to.columns);
    const float *right = plus.rank ? plus.right + piece.column : nullptr;
    for (int panel = 0; panel < tile.lanes; panel += kLine) {
        const int used = least(kLine, tile.lanes - panel);
        T *rows[kLine];
        const float *left[kLine];
        bool all = true;
        for (int i = 0; i < used; ++i) {
            const int64_t row = panel + i < tile.rows ? tile.to[panel + i] - piece.row : -1;
            rows[i] = row >= 0 && row < piece.to.rows ? out + row * piece.to.row_stride : nullptr;
            left[i] = plus.rank && rows[i] ? plus.left + (row + piece.row) * plus.rank : plus.left;
            all &= rows[i] != nullptr;
        }
        const float *from = lines.at(panel);
        Vector of_rows[kParts];
        for (int lane = 0; lane < used; lane += kLanes)
            of_rows[lane / kLanes] = row_scale ? load(row_scale + panel + lane) : broadcast(1.0f);
        const auto line = [&](int column, int lane) {
            const Vector v = load(from + int64_t(index ? index[column] : piece.column + column) * kLine + lane);
            if (column_scale) return v * (of_rows[lane / kLanes] * column_scale[column]);
            return row_scale ? v * of_rows[lane / kLanes] : v;
        };
        float weights[kVectorsAtOnce + 1][kLine] = {};
        if (tally) {
            float totals[kMostWatched + kMostWatched / kVectorsAtOnce][kLine];
            for_groups(tally->rows, [&](auto k, int first, int number) {
                for (int lane = 0; lane < used; lane += kLanes)
                    tally_rows<decltype(k)::value>(width, packed + int64_t(first) * width, totals[number] + lane,
                                                   [&](int column) { return rounded(line(column, lane), out); });
            });
            for (int i = 0; i < used; ++i) {
                if (panel + i >= tile.rows) break;
                const int64_t row = tile.to[panel + i];
                watched(tally->rows, row, piece.to.rows, totals[0] + i, kLine);
                for (int k = 0; k < tally->weights; ++k) weights[k][i] = tally->q[k * piece.to.rows + row];
                weights[tally->weights][i] = 1;
            }
        }
        int column = 0;
        for (; column + kLine <= width; column += kLine)
            for (int lane = 0; lane < used; lane += kLanes) {
                Vector v[kParts][kLanes];
                for (int part = 0; part < kParts; ++part) {
                    const int first = column + part * kLanes;
                    for (int i = 0; i < kLanes; ++i) v[part][i] = line(first + i, lane);
                    transpose(v[part]);
                    if (piece.bias) {
                        const Vector bias = load(piece.bias + first);
                        for (int i = 0; i < kLanes; ++i) v[part][i] += bias;
                    }
                    for (int k = 0; k < plus.rank; ++k) {
                        const Vector of_columns = load(right + k * of_right + first);
                        for (int i = 0; i < kLanes; ++i) v[part][i] += broadcast(left[lane + i][k]) * of_columns;
                    }
                }
                if (tally && tally->weights)
                    for (int part = 0; part < kParts; ++part) {
                        for (int i = 0; i < kLanes; ++i) v[part][i] = rounded(v[part][i], out);
                        tally_columns(v[part], weights[0] + lane, tally->weights,
                                      tally->recent + column + part * kLanes, padded(width));
                    }
                for (int i = lane; piece.row == 0 && i < lane + kLanes; ++i) next.fetch(i, int(piece.column) + column);
                // Whole cache lines at a time, or streaming would be slower than not.
                for (int i = 0; i < kLanes; ++i)
                    if (all || rows[lane + i])
                        for (int part = 0; part < kParts; ++part)
                            put(rows[lane + i] + column + part * kLanes, v[part][i], past_caches);
            }
        for (; column < width; ++column)
            for (int lane = 0; lane < used; lane += kLanes) {
                const Vector v = line(column, lane);
                for (int i = 0; i < kLanes; ++i) {
                    float value = piece.bias ? v[i] + piece.bias[column] : v[i];
                    for (int k = 0; k < plus.rank; ++k) value += left[lane + i][k] * right[k * of_right + column];
                    if (!rows[lane + i]) continue;
                    narrow(value, rows[lane + i] + column);
                    value = widen(rows[lane + i][column]);
                    for (int k = 0; tally && tally->weights && k <= tally->weights; ++k)
                        tally->recent[k * padded(width) + column] +=
                            value * (k < tally->weights ? weights[k][lane + i] : value);
                }
            }
    }
}

inline bool worth_streaming(const Piece &piece) {
    const Matrix &to = piece.to;
    return !to.half && to.rows * to.columns >= kStreamFrom && aligned(to.data) && to.row_stride % kLanes == 0;
}

// --- one pass: rows by their round's blocks, columns if it is their turn ---

inline void pass(const Sandwich &s, const Matrix &x, int round, bool with_columns, const Piece *pieces, int count,
                 const Addend &plus, Tally *tally) {
    const int width = int(x.columns);
    const Operator *rows = s.rows, *columns = with_columns ? s.columns : nullptr;
    const bool mixes = rows && rows->rounds;
    const bool last = !mixes || round == rows->rounds - 1;
    const int total = int(x.rows);
    // Without blocks a tile is a cache line high, or a vector where that would leave the caches.
    const int height = width <= 4096 ? kLine : kLanes;
    const int tiles = mixes ? rows->counts[round] : (total + height - 1) / height;
    int most = height;
    for (int t = 0; mixes && t < tiles; ++t) most = greatest(most, rows->blocks[round][t].side);
    const int lanes_most = rounded(most, kLine);
    const int64_t panel = int64_t(width) * kLine;
    const Lines lines{scratch(0, size_t(width) * lanes_most), panel};
    const Lines other{columns && columns->rounds ? scratch(1, size_t(width) * kTogether) : nullptr, panel};
    float *chunk = mixes ? scratch(6, size_t(2 * kChunk) * lanes_most) : nullptr;
    float *mixed = chunk + kChunk * lanes_most;
    // Each round but the last puts rows where the next one takes them in turn.
    int32_t *numbers = reinterpret_cast<int32_t *>(scratch(2, 2 * size_t(total))), *placed = numbers + total;
    for (int i = 0; i < total; ++i) numbers[i] = i;
    for (int i = 0; mixes && !last && i < total; ++i) placed[rows->gathers[round + 1][i]] = i;
    const int32_t *from = rows && round == 0 ? rows->gathers[0] : numbers;
    const int32_t *to = !mixes ? numbers : last ? rows->last_inverse : placed;
    float *scales = rows && rows->scale ? scratch(3, size_t(total) + kLine) : nullptr;
    for (int i = 0; scales && i < total; ++i) scales[i] = rows->scale[i];

    Watch *watch = round == 0 ? s.watch : nullptr;
    const int kinds = watch ? watch->vectors + groups(*watch) : 0;
    float *totals = watch ? scratch(7, size_t(kinds) * (size_t(most) * kLanes + kLine + padded(width))) : nullptr;
    float *packed = totals + size_t(kinds) * (size_t(most) * kLanes + kLine);
    if (watch) pack(*watch, width, mixes, packed);
    float *of_tally = tally ? scratch(8, size_t(tally->rows.vectors) * width) : nullptr;
    if (tally) pack(tally->rows, width, false, of_tally);

    const int element = x.half ? sizeof(uint16_t) : sizeof(float);
    const char *source = static_cast<const char *>(x.data);
    for (int t = 0; t < tiles; ++t) {
        const int start = mixes ? rows->blocks[round][t].start : t * height;
        const int side = mixes ? rows->blocks[round][t].side : least(height, total - start);
        const Tile tile{side, rounded(side, kLanes), from + start, to + start};
        const NextRows below{source, x.row_stride * element, element, tile.from + side,
                             least(side, total - start - side)};
        if (!mixes && x.half) read_tile(static_cast<const uint16_t *>(x.data), x.row_stride, width, tile, lines);
        if (!mixes && !x.half) read_tile(static_cast<const float *>(x.data), x.row_stride, width, tile, lines);
        if (watch && !mixes)
            for (int lane = 0; lane < tile.lanes; lane += kLine) {
                const int used = least(kLine, tile.lanes - lane);
                for_groups(*watch, [&](auto k, int first, int line) {
                    watch_panel<decltype(k)::value>(lines.at(lane), used, kLine, width, packed + int64_t(first) * width,
                                                    totals + line * kLine);
                });
                for (int i = lane; i < least(lane + kLine, tile.rows); ++i)
                    watched(*watch, tile.from[i], total, totals + i - lane, kLine);
            }
        if (watch && mixes) std::memset(totals, 0, sizeof(float) * side * kinds * kLanes);
        for (int column = 0; mixes && column < width; column += kChunk) {
            const int some = least(kChunk, width - column);
            if (x.half)
                read_chunk(static_cast<const uint16_t *>(x.data), x.row_stride, column, some, tile, chunk);
            else
                read_chunk(static_cast<const float *>(x.data), x.row_stride, column, some, tile, chunk);
            if (watch)
                for_groups(*watch, [&](auto k, int first, int line) {
                    constexpr int K = decltype(k)::value;
                    watch_chunk<K>(chunk, side, kChunk, some, packed + first * padded(width) + column * K, kinds,
                                   totals + line * kLanes);
                });
            const NextRows beside{source + (column + kChunk) * element, below.stride, element, tile.from, side};
            const NextRows &next = column + kChunk < width ? beside : below;
            mix_rows(rows->blocks[round][t], chunk, mixed, some, next);
            const Lines here{lines.data + column * kLine, lines.panel};
            read_tile(mixed, kChunk, some, Tile{side, tile.lanes, numbers, nullptr}, here);
        }
        for (int row = 0; watch && mixes && row < side; ++row) {
            float sums[kMostWatched + kMostWatched / kVectorsAtOnce];
            for (int k = 0; k < kinds; ++k) sums[k] = sum(load(totals + (int64_t(row) * kinds + k) * kLanes));
            watched(*watch, tile.from[row], total, sums, 1);
        }
        // Lanes have nothing to do with each other from here on: a few at a time stay in the second-level cache.
        for (int lane = 0; lane < tile.lanes; lane += kTogether) {
            const int real = least(kTogether, side - lane), lanes = least(kTogether, tile.lanes - lane);
            const Tile part{real, lanes, nullptr, tile.to + lane};
            Lines from{lines.at(lane), panel}, to = other;
            for (int r = 0; columns && r < columns->rounds; ++r) {
                for (int b = 0; b < columns->counts[r]; ++b) {
                    const Block &block = columns->blocks[r][b];
                    mix_columns(block, columns->gathers[r] + block.start, from, to, lanes);
                }
                const Lines kept = from;
                from = to, to = kept;
            }
            const float *scale = scales ? scales + start + lane : nullptr;
            const NextRows next = mixes ? NextRows{} : below;
            for (int p = 0; p < count; ++p) {
                const bool past_caches = worth_streaming(pieces[p]);
                if (pieces[p].to.half)
                    write_tile<uint16_t>(from, part, columns, pieces[p], plus, tally, of_tally, width, scale, next,
                                         false);
                else
                    write_tile<float>(from, part, columns, pieces[p], plus, tally, of_tally, width, scale, next,
                                      past_caches);
            }
            if (tally && tally->weights) tally->since += real, settle(*tally, width, kFlush);
        }
    }
}

inline void sandwich(const Sandwich &s) {
    const int rounds = s.rows && s.rows->rounds ? s.rows->rounds : 1;
    Matrix x = s.x;
    for (int round = 0; round < rounds - 1; ++round) {
        const Matrix between{scratch(4 + round % 2, size_t(x.rows * x.columns)), x.rows, x.columns, x.columns, false};
        const Piece all{between, 0, 0, nullptr};
        pass(s, x, round, round == 0, &all, 1, Addend{}, nullptr);
        x = between;
    }
    pass(s, x, rounds - 1, rounds == 1, s.pieces, s.count, s.plus, s.tally);
    if (s.tally && s.tally->weights) settle(*s.tally, s.x.columns, 0);
    fence();
}

}  // namespace tempo::TEMPO_ISA
