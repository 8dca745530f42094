// Attention and its gradients by AMX, one head at a time, in strips of 32 rows of scores that stay near the processor.
//
// Scores are split in parts where they become exponentials. For gradients they are computed with keys in rows: then
// what multiplies from the left lies as AMX reads it, and only queries' gradients are turned.
#pragma once

#include "amx.h"
#include "attention.h"
#include "sandwich_types.h"

namespace tempo::TEMPO_ISA {

constexpr int64_t kStrip = 2 * kSide;
static_assert(kStrip == kDepth);

// With fewer, AVX-512 is as fast: what is split is multiplied less often, and a part of the last tiles is empty.
constexpr int64_t kLeastKeys = 128;

// Whether to write x past the caches.
inline bool streams(const Attention &a, const Heads &x) {
    return a.samples * a.heads * a.queries * a.width >= kStreamFrom && aligned(x.data) &&
           (x.sample | x.head | x.token) % kLanes == 0;
}

// Divides memory; without any, only counts it.
struct Room {
    float *memory;
    int64_t used = 0;

    float *floats(int64_t count) {
        float *found = memory ? memory + used : nullptr;
        used += (count + kTile - 1) / kTile * kTile;
        return found;
    }
    Tiles tiles(int64_t count, int64_t depth) {
        return {reinterpret_cast<uint32_t *>(floats(count * depth * kSplit)), depth};
    }
};

template <typename T>
inline T room_for(const Attention &a) {
    Room counted{nullptr};
    T{a, counted};
    Room room{scratch(1, size_t(counted.used))};
    return T{a, room};
}

inline Tiles from_tile(Tiles x, int64_t tile) { return {x.at(tile, 0), x.depth}; }

// Whether AMX can multiply what belongs to one head of keys.
inline bool splits(const Attention &a, int64_t n, int64_t h) {
    const auto all = [&](const Heads &x, int64_t head, int64_t tokens) {
        return splits(at(x, n, head), x.token, tokens, a.width);
    };
    bool found = all(a.k, h / a.group, a.keys) && all(a.v, h / a.group, a.keys);
    for (int64_t i = h; found && i < h + a.group; ++i)
        found = all(a.q, i, a.queries) && (!a.g.data || all(a.g, i, a.queries));
    return found;
}

struct AttendRoom {
    Tiles q, k, v, p;
    int64_t stride;
    float *scores, *out;

    AttendRoom(const Attention &a, Room &room)
        : q(room.tiles(2, steps(a.width))),
          k(room.tiles(tiles(a.keys), steps(a.width))),
          v(room.tiles(tiles(a.width), steps(a.keys))),
          p(room.tiles(2, steps(a.keys))),
          stride(score_stride(a.keys)),
          scores(room.floats(kStrip * stride)),
          out(room.floats(kStrip * a.width)) {}
};

// As `exponentials`, into row `r` of tiles, zero to their ends.
inline float split_exponentials(const float *s, int64_t valid, float scale, int64_t depth, Tiles p, int64_t r,
                                float *greatest) {
    *greatest = greatest_of(s, valid) * scale;
    const float scale_2 = scale * kLog2e, greatest_2 = *greatest * kLog2e;
    Vector total{};
    const auto power = [&](int64_t j) {
        if (j >= valid) return Vector{};
        const Vector e = only(power_of_two(load(s + j) * scale_2 - greatest_2), j, valid, 0.f);
        total += e;
        return e;
    };
    for (int64_t k = 0; k < depth; ++k) {
        const Vector left = power(k * kDepth), right = power(k * kDepth + kLanes);
        store_pairs(p.at(r / kSide, k) + r % kSide * 16, split(left), split(right));
    }
    return sum(total);
}

inline void attend_head(const Attention &a, const AttendRoom &room, int64_t n, int64_t h, NextHead &next) {
    const int64_t shared = h / a.group;
    const bool past_caches = streams(a, a.out);
    const auto between = [&] { next.fetch(); };
    if (h % a.group == 0) {
        pack<false, true>(at(a.k, n, shared), a.k.token, a.keys, a.width, room.k);
        pack<true, false>(at(a.v, n, shared), a.v.token, a.keys, a.width, room.v);
    }
    for (int64_t i = 0; i < a.queries; i += kStrip) {
        const int64_t rows = a.queries - i < kStrip ? a.queries - i : kStrip, seen = keys_seen(a, i, rows);
        pack<false, false>(at(a.q, n, h, i), a.q.token, rows, a.width, room.q);
        multiply_tiles(room.q, tiles(rows), room.k, tiles(seen), steps(a.width), room.scores, room.stride,
                       false, between);
        float inverse[kStrip];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t valid = a.causal && i + r + 1 < a.keys ? i + r + 1 : a.keys;
            float greatest;
            const float total = split_exponentials(room.scores + r * room.stride, valid, a.scale, steps(seen), room.p, r,
                                                   &greatest);
            a.lse[(n * a.heads + h) * a.queries + i + r] = greatest + __builtin_logf(total);
            inverse[r] = 1.f / total;
        }
        multiply_tiles(room.p, tiles(rows), room.v, tiles(a.width), steps(seen), room.out, a.width,
                       false, between);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < a.width; j += kLanes)
                put(at(a.out, n, h, i + r) + j, load(room.out + r * a.width + j) * inverse[r], past_caches);
    }
}

// Queries at a time.
inline int64_t gradient_rows(const Attention &a) {
    const int64_t most = a.causal ? kCausalQueries : kQueries, blocks = (a.queries + most - 1) / most;
    return steps((a.queries + blocks - 1) / blocks) * kDepth;
}

struct GradientRoom {
    Tiles k, k_turned, v, q, q_turned, g, g_turned;
    Tiles p, ds, ds_right;  // a strip as what multiplies from the left, and all keys as what does from the right
    int64_t stride;
    float *scores, *dp, *dq_turned, *dk, *dv, *lse_2, *delta;

    GradientRoom(const Attention &a, Room &room) : GradientRoom(a, room, gradient_rows(a)) {}
    GradientRoom(const Attention &a, Room &room, int64_t rows)
        : k(room.tiles(tiles(a.keys), steps(a.width))),
          k_turned(room.tiles(tiles(a.width), steps(a.keys))),
          v(room.tiles(tiles(a.keys), steps(a.width))),
          q(room.tiles(tiles(a.width), steps(rows))),
          q_turned(room.tiles(tiles(rows), steps(a.width))),
          g(room.tiles(tiles(a.width), steps(rows))),
          g_turned(room.tiles(tiles(rows), steps(a.width))),
          p(room.tiles(2, steps(rows))),
          ds(room.tiles(2, steps(rows))),
          ds_right(room.tiles(tiles(rows), steps(a.keys))),
          stride(score_stride(rows)),
          scores(room.floats(kStrip * stride)),
          dp(room.floats(kStrip * stride)),
          dq_turned(room.floats(a.width * stride)),
          dk(room.floats(tiles(a.keys) * kSide * a.width)),
          dv(room.floats(tiles(a.keys) * kSide * a.width)),
          lse_2(room.floats(rows)),
          delta(room.floats(rows)) {}
};

// Lanes from `first` on, before `last`.
inline __mmask16 lanes(int64_t first, int64_t last) {
    const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= kLanes ? 0xffffu : (1u << n) - 1; };
    return __mmask16(below(last) & ~below(first));
}

// Scores of the strip from key `s` on and the queries from `i` on become what multiplies next.
inline void split_strip(const Attention &a, const GradientRoom &room, int64_t s, int64_t i, int64_t rows) {
    const float scale_2 = a.scale * kLog2e;
    for (int64_t t = 0; t < kSide; ++t)
        for (int64_t c = 0; c < steps(rows); ++c) {
            Split p[2][2], ds[2][2];  // by halves of the strip, and of the queries
            for (int64_t row = 0; row < 2; ++row)
                for (int64_t half = 0; half < 2; ++half) {
                    const int64_t key = s + row * kSide + t, column = c * kDepth + half * kLanes;
                    const __mmask16 seen =
                        key < a.keys ? lanes(a.causal ? key - i - column : 0, rows - column) : __mmask16(0);
                    const int64_t from = (row * kSide + t) * room.stride + column;
                    const Vector power = power_of_two(load(room.scores + from) * scale_2 - load(room.lse_2 + column));
                    const Vector e = (Vector)_mm512_maskz_mov_ps(seen, (__m512)power);
                    const Vector d = e * (load(room.dp + from) - load(room.delta + column)) * a.scale;
                    p[row][half] = split(e);
                    ds[row][half] = split((Vector)_mm512_maskz_mov_ps(seen, (__m512)d));
                }
            for (int64_t row = 0; row < 2; ++row) {
                store_pairs(room.p.at(row, c) + t * 16, p[row][0], p[row][1]);
                store_pairs(room.ds.at(row, c) + t * 16, ds[row][0], ds[row][1]);
                store_pairs(room.ds_right.at(2 * c + row, s / kStrip) + t * 16, ds[0][row], ds[1][row]);
            }
        }
}

inline void differentiate_block(const Attention &a, const GradientRoom &room, int64_t n, int64_t h, int64_t i,
                                int64_t rows, bool add, NextHead &next) {
    const auto between = [&] { next.fetch(); };
    const int64_t seen = keys_seen(a, i, rows), wide = tiles(a.width), deep = steps(a.width);
    pack<true, false>(at(a.q, n, h, i), a.q.token, rows, a.width, room.q);
    pack<false, true>(at(a.q, n, h, i), a.q.token, rows, a.width, room.q_turned);
    pack<true, false>(at(a.g, n, h, i), a.g.token, rows, a.width, room.g);
    pack<false, true>(at(a.g, n, h, i), a.g.token, rows, a.width, room.g_turned);
    for (int64_t r = 0; r < rows; ++r) {
        const float *out = at(a.out, n, h, i + r), *g = at(a.g, n, h, i + r);
        Vector product{};
        for (int64_t j = 0; j < a.width; j += kLanes) product += load(out + j) * load(g + j);
        room.delta[r] = sum(product);
        room.lse_2[r] = a.lse[(n * a.heads + h) * a.queries + i + r] * kLog2e;
    }
    for (int64_t s = 0; s < seen; s += kStrip) {
        const int64_t strip = tiles(seen - s < kStrip ? seen - s : kStrip), first = s / kSide;
        multiply_tiles(from_tile(room.k, first), strip, room.q_turned, tiles(rows), deep, room.scores, room.stride,
                       false, between);
        multiply_tiles(from_tile(room.v, first), strip, room.g_turned, tiles(rows), deep, room.dp, room.stride,
                       false, between);
        split_strip(a, room, s, i, rows);
        multiply_tiles(room.p, strip, room.g, wide, steps(rows), room.dv + s * a.width, a.width, add,
                       between);
        multiply_tiles(room.ds, strip, room.q, wide, steps(rows), room.dk + s * a.width, a.width, add,
                       between);
    }
    multiply_tiles(room.k_turned, wide, room.ds_right, tiles(rows), steps(seen), room.dq_turned, room.stride,
                   false, between);
    const bool past_caches = streams(a, a.dq);
    for (int64_t r = 0; r < rows; r += kLanes)
        for (int64_t j = 0; j < a.width; j += kLanes) {
            Vector block[kLanes];
            load_block(room.dq_turned + j * room.stride + r, room.stride, kLanes, block);
            transpose(block);
            for (int64_t t = 0; t < kLanes && r + t < rows; ++t)
                put(at(a.dq, n, h, i + r + t) + j, block[t], past_caches);
        }
}

inline void differentiate_head(const Attention &a, const GradientRoom &room, int64_t n, int64_t h, NextHead &next) {
    const int64_t shared = h / a.group, block = gradient_rows(a), last = (a.queries - 1) / block * block;
    if (h % a.group == 0) {
        pack<false, false>(at(a.k, n, shared), a.k.token, a.keys, a.width, room.k);
        pack<true, true>(at(a.k, n, shared), a.k.token, a.keys, a.width, room.k_turned);
        pack<false, false>(at(a.v, n, shared), a.v.token, a.keys, a.width, room.v);
    }
    // The last queries see all keys: theirs is what the others add to.
    for (int64_t i = last; i >= 0; i -= block)
        differentiate_block(a, room, n, h, i, a.queries - i < block ? a.queries - i : block,
                            i < last || h % a.group != 0, next);
    const bool past_caches = streams(a, a.dk) && streams(a, a.dv);
    if ((h + 1) % a.group == 0)
        for (int64_t t = 0; t < a.keys; ++t)
            for (int64_t j = 0; j < a.width; j += kLanes) {
                put(at(a.dk, n, shared, t) + j, load(room.dk + t * a.width + j), past_caches);
                put(at(a.dv, n, shared, t) + j, load(room.dv + t * a.width + j), past_caches);
            }
}

inline void attend_by_tiles(const Attention &a) {
    if (a.keys < kLeastKeys) return attend(a);
    const AttendRoom room = room_for<AttendRoom>(a);
    const TileRegisters held;
    bool split = false;
    for_heads(a, {a.q}, {a.k, a.v}, [&](int64_t n, int64_t h, NextHead &next) {
        if (h % a.group == 0) split = splits(a, n, h);
        split ? attend_head(a, room, n, h, next) : attend_head(a, n, h, next);
    });
    fence();
}

inline void differentiate_attention_by_tiles(const Attention &a) {
    if (a.keys < kLeastKeys) return differentiate_attention(a);
    const GradientRoom room = room_for<GradientRoom>(a);
    const TileRegisters held;
    bool split = false;
    for_heads(a, {a.q, a.g, a.out}, {a.k, a.v}, [&](int64_t n, int64_t h, NextHead &next) {
        if (h % a.group == 0) split = splits(a, n, h);
        split ? differentiate_head(a, room, n, h, next) : differentiate_head(a, n, h, next);
    });
    fence();
}

}  // namespace tempo::TEMPO_ISA
