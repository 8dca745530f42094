// Attention and its gradients, one head at a time: as flash attention, nothing of the size of all scores is kept.
//
// Every product is `multiply`: rows of the left operand, read where they are with any strides, times the right one packed
// into panels of up to three vectors of columns, which the registers hold a block of the result for.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "activation.h"
#include "layers_types.h"
#include "simd.h"

namespace tempo::TEMPO_ISA {

// How many vectors the next panel holds. Four are two panels of two: one alone would wait for its sums.
inline int panel_vectors(int64_t left) { return left == 4 ? 2 : int(left < 3 ? left : 3); }

// Calls f(first column, vectors, where the panel starts) for the panels of `columns` columns of `depth` rows.
template <typename F>
inline void for_panels(int64_t columns, int64_t depth, const F &f) {
    const int64_t vectors = (columns + kLanes - 1) / kLanes;
    for (int64_t done = 0; done < vectors;) {
        const int width = panel_vectors(vectors - done);
        f(done * kLanes, width, done * kLanes * depth);
        done += width;
    }
}

// Packs a (depth × columns) operand whose rows are contiguous; `columns` is a multiple of kLanes.
inline void pack_rows(const float *from, int64_t stride, int64_t depth, int64_t columns, float *panels) {
    for_panels(columns, depth, [=](int64_t first, int width, int64_t start) {
        float *to = panels + start;
        for (int64_t k = 0; k < depth; ++k)
            for (int w = 0; w < width; ++w, to += kLanes) store(to, load(from + k * stride + first + w * kLanes));
    });
}

// Packs a (depth × columns) operand whose columns are contiguous; `depth` is a multiple of kLanes. Columns that are
// missing to a whole vector are zero.
inline void pack_columns(const float *from, int64_t stride, int64_t depth, int64_t columns, float *panels) {
    for_panels(columns, depth, [=](int64_t first, int width, int64_t start) {
        for (int w = 0; w < width; ++w) {
            const int64_t here = first + w * kLanes;
            for (int64_t k = 0; k < depth; k += kLanes) {
                Vector block[kLanes];
                for (int i = 0; i < kLanes; ++i)
                    block[i] = here + i < columns ? load(from + (here + i) * stride + k) : Vector{};
                transpose(block);
                for (int i = 0; i < kLanes; ++i) store(panels + start + ((k + i) * width + w) * kLanes, block[i]);
            }
        }
    });
}

// The left operand: element (i, k) is at data[i * row + k * column].
struct Left {
    const float *data;
    int64_t row, column;
};

template <int rows, int width>
inline void multiply_block(Left a, const float *panel, int64_t depth, float *out, int64_t stride, bool add) {
    Vector sums[rows][width] = {};
    for (int64_t k = 0; k < depth; ++k, panel += width * kLanes) {
        Vector b[width];
        for (int w = 0; w < width; ++w) b[w] = load(panel + w * kLanes);
        for (int r = 0; r < rows; ++r) {
            const Vector left = broadcast(a.data[r * a.row + k * a.column]);
            for (int w = 0; w < width; ++w) sums[r][w] += left * b[w];
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int w = 0; w < width; ++w) {
            float *to = out + r * stride + w * kLanes;
            store(to, add ? load(to) + sums[r][w] : sums[r][w]);
        }
}

template <int width, typename F>
inline void multiply_panel(Left a, int64_t rows, const float *panel, int64_t depth, float *out, int64_t stride, bool add,
                           const F &between) {
    int64_t i = 0;
    const auto block = [&](auto count) {
        multiply_block<count, width>({a.data + i * a.row, a.row, a.column}, panel, depth, out + i * stride, stride, add);
        i += count;
        between();
    };
    while (rows - i >= 4) block(std::integral_constant<int, 4>{});
    if (rows - i == 3) block(std::integral_constant<int, 3>{});
    if (rows - i == 2) block(std::integral_constant<int, 2>{});
    if (rows - i == 1) block(std::integral_constant<int, 1>{});
}

// The right operand, as the functions above pack it.
struct Packed {
    const float *panels;
    int64_t depth, columns;
};

// out = a · b, or out += a · b, of the first `depth` rows and `columns` columns of b; whole panels are written. Calls
// between() now and then.
template <typename F>
inline void multiply(Left a, int64_t rows, Packed b, int64_t depth, int64_t columns, float *out, int64_t stride, bool add,
                     const F &between) {
    for_panels(b.columns, b.depth, [&](int64_t first, int width, int64_t start) {
        if (first >= columns) return;
        const float *panel = b.panels + start;
        float *to = out + first;
        switch (width) {
            case 1: return multiply_panel<1>(a, rows, panel, depth, to, stride, add, between);
            case 2: return multiply_panel<2>(a, rows, panel, depth, to, stride, add, between);
            default: return multiply_panel<3>(a, rows, panel, depth, to, stride, add, between);
        }
    });
}

inline float *at(const Heads &x, int64_t sample, int64_t head, int64_t token = 0) {
    return x.data + sample * x.sample + head * x.head + token * x.token;
}

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// How many rows of scores to take at once: blocks of about one size.
inline int64_t block_rows(const Attention &a) {
    const int64_t most = a.causal ? kCausalQueries : kQueries;
    const int64_t blocks = (a.queries + most - 1) / most, even = (a.queries + blocks - 1) / blocks;
    return (even + 3) / 4 * 4;
}

// Keys that the `rows` queries from i on see, all of them together. The last queries are given all keys, so that every
// one is.
inline int64_t keys_seen(const Attention &a, int64_t i, int64_t rows) {
    return a.causal && i + rows < a.queries && i + rows < a.keys ? i + rows : a.keys;
}

// In halves, within registers, as `sum`.
inline float most(Vector v) {
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
#if defined(__AVX512F__)
    const auto eight = larger(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    const Vector eight = v;
#endif
    const auto four = larger(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                             __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    const auto two = larger(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
    return larger(float(two[0]), float(two[1]));
}

// Lanes of the vector of elements from `first` on; those from `valid` on are zero, or what `otherwise` says.
inline Vector only(Vector v, int64_t first, int64_t valid, float otherwise) {
    if (first + kLanes <= valid) return v;
    Integers lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes < int32_t(valid - first) ? v : broadcast(otherwise);
}

// The greatest of the scores of one row.
inline float greatest_of(const float *s, int64_t valid) {
    Vector top = broadcast(-__builtin_inff());
    for (int64_t j = 0; j < valid; j += kLanes) {
        const Vector v = only(load(s + j), j, valid, -__builtin_inff());
        top = v > top ? v : top;
    }
    return most(top);
}

// Scores of one row become exponentials of what they are below the greatest, zero from `valid` on; returns their sum, and
// sets the greatest.
inline float exponentials(float *s, int64_t columns, int64_t valid, float scale, float *greatest) {
    *greatest = greatest_of(s, valid) * scale;
    const float scale_2 = scale * kLog2e, greatest_2 = *greatest * kLog2e;
    Vector total{};
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vector e = only(power_of_two(load(s + j) * scale_2 - greatest_2), j, valid, 0.f);
        store(s + j, e);
        total += e;
    }
    return sum(total);
}

// Fetches what the next head reads or writes, some lines at a time while this one is computed: tokens lie far apart, and a
// processor waits for no more than a few lines at once.
class NextHead {
  public:
    // For head h of sample n, unless that is half of what a core's own cache holds.
    NextHead(const Attention &a, std::initializer_list<Heads> of_queries, std::initializer_list<Heads> of_keys, int64_t n,
          int64_t h)
        : bytes_(a.width * int64_t(sizeof(float))) {
        const int64_t tokens = int64_t(of_queries.size()) * a.queries + int64_t(of_keys.size()) * a.keys;
        if (n == a.samples || tokens * bytes_ >= kMost) return;
        for (const Heads &x : of_queries) add(x, n, h, a.queries);
        if (h % a.group == 0)
            for (const Heads &x : of_keys) add(x, n, h / a.group, a.keys);
    }

    void fetch() {
        for (int64_t done = 0; done < kSome && part_ < count_; done += bytes_) {
            Part &part = parts_[part_];
            for (int64_t j = 0; j < bytes_; j += 64) __builtin_prefetch(part.next + j, 0, 2);
            part.next += part.stride;
            if (--part.left == 0) ++part_;
        }
    }

  private:
    static constexpr int64_t kMost = 1 << 20, kSome = 1 << 10;
    struct Part {
        const char *next;
        int64_t stride, left;
    } parts_[8];
    int part_ = 0, count_ = 0;
    int64_t bytes_;

    void add(const Heads &x, int64_t n, int64_t h, int64_t tokens) {
        if (tokens)
            parts_[count_++] = {reinterpret_cast<const char *>(at(x, n, h)), x.token * int64_t(sizeof(float)), tokens};
    }
};

inline void attend_head(const Attention &a, int64_t n, int64_t h, NextHead &next) {
    const auto between = [&] { next.fetch(); };
    const int64_t keys = whole_vectors(a.keys), stride = score_stride(a.keys), block = block_rows(a);
    const int64_t shared = h / a.group;
    float *scores = a.memory, *keys_packed = scores + kQueries * stride, *values_packed = keys_packed + keys * a.width;
    if (h % a.group == 0) {
        pack_columns(at(a.k, n, shared), a.k.token, a.width, a.keys, keys_packed);
        pack_rows(at(a.v, n, shared), a.v.token, a.keys, a.width, values_packed);
    }
    for (int64_t i = 0; i < a.queries; i += block) {
        const int64_t rows = a.queries - i < block ? a.queries - i : block, seen = keys_seen(a, i, rows);
        multiply({at(a.q, n, h, i), a.q.token, 1}, rows, {keys_packed, a.width, a.keys}, a.width, seen, scores, stride,
                 false, between);
        float inverse[kQueries];
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t valid = a.causal && i + r + 1 < a.keys ? i + r + 1 : a.keys;
            float greatest;
            const float total = exponentials(scores + r * stride, whole_vectors(seen), valid, a.scale, &greatest);
            a.lse[(n * a.heads + h) * a.queries + i + r] = greatest + __builtin_logf(total);
            inverse[r] = 1.f / total;
        }
        multiply({scores, stride, 1}, rows, {values_packed, a.keys, a.width}, seen, a.width, at(a.out, n, h, i),
                 a.out.token, false, between);
        for (int64_t r = 0; r < rows; ++r) {
            float *out = at(a.out, n, h, i + r);
            for (int64_t j = 0; j < a.width; j += kLanes) store(out + j, load(out + j) * inverse[r]);
        }
    }
}

inline void differentiate_head(const Attention &a, int64_t n, int64_t h, NextHead &next) {
    const auto between = [&] { next.fetch(); };
    const int64_t stride = score_stride(a.keys), block = block_rows(a), shared = h / a.group;
    const int64_t tall = stride > kQueries ? stride : kQueries;
    float *p = a.memory, *ds = p + kQueries * stride;
    float *keys_across = ds + kQueries * stride, *values_across = keys_across + tall * a.width;
    float *keys_packed = values_across + tall * a.width, *g_packed = keys_packed + tall * a.width;
    float *queries_packed = g_packed + tall * a.width;
    if (h % a.group == 0) {
        pack_columns(at(a.k, n, shared), a.k.token, a.width, a.keys, keys_across);
        pack_columns(at(a.v, n, shared), a.v.token, a.width, a.keys, values_across);
        pack_rows(at(a.k, n, shared), a.k.token, a.keys, a.width, keys_packed);
    }
    int64_t begun = h % a.group == 0 ? 0 : a.keys;  // keys whose gradients hold something to add to
    for (int64_t i = 0; i < a.queries; i += block) {
        const int64_t rows = a.queries - i < block ? a.queries - i : block, seen = keys_seen(a, i, rows);
        const Packed gradients{g_packed, rows, a.width}, queries{queries_packed, rows, a.width};
        pack_rows(at(a.g, n, h, i), a.g.token, rows, a.width, g_packed);
        pack_rows(at(a.q, n, h, i), a.q.token, rows, a.width, queries_packed);
        multiply({at(a.q, n, h, i), a.q.token, 1}, rows, {keys_across, a.width, a.keys}, a.width, seen, p, stride,
                 false, between);
        multiply({at(a.g, n, h, i), a.g.token, 1}, rows, {values_across, a.width, a.keys}, a.width, seen, ds, stride,
                 false, between);
        for (int64_t r = 0; r < rows; ++r) {
            const float *out = at(a.out, n, h, i + r), *g = at(a.g, n, h, i + r);
            Vector product{};
            for (int64_t j = 0; j < a.width; j += kLanes) product += load(out + j) * load(g + j);
            const float delta = sum(product), lse = a.lse[(n * a.heads + h) * a.queries + i + r];
            const int64_t valid = a.causal && i + r + 1 < a.keys ? i + r + 1 : a.keys;
            const float scale_2 = a.scale * kLog2e;
            float *p_row = p + r * stride, *ds_row = ds + r * stride;
            for (int64_t j = 0; j < whole_vectors(seen); j += kLanes) {
                const Vector e = only(power_of_two(load(p_row + j) * scale_2 - lse * kLog2e), j, valid, 0.f);
                store(p_row + j, e);
                store(ds_row + j, e * (load(ds_row + j) - delta) * a.scale);
            }
        }
        multiply({ds, stride, 1}, rows, {keys_packed, a.keys, a.width}, seen, a.width, at(a.dq, n, h, i), a.dq.token,
                 false, between);
        const auto to_keys = [&](int64_t from, int64_t count, bool add) {
            multiply({p + from, 1, stride}, count, gradients, rows, a.width, at(a.dv, n, shared, from), a.dv.token, add,
                     between);
            multiply({ds + from, 1, stride}, count, queries, rows, a.width, at(a.dk, n, shared, from), a.dk.token, add,
                     between);
        };
        const int64_t added = begun < seen ? begun : seen;
        to_keys(0, added, true);
        to_keys(added, seen - added, false);
        begun = begun < seen ? seen : begun;
    }
}

// Calls head(sample, head, what to fetch meanwhile) for each.
template <typename F>
inline void for_heads(const Attention &a, std::initializer_list<Heads> of_queries, std::initializer_list<Heads> of_keys,
                      const F &head) {
    for (int64_t n = 0; n < a.samples; ++n)
        for (int64_t h = 0; h < a.heads; ++h) {
            const bool last = h + 1 == a.heads;
            NextHead next(a, of_queries, of_keys, n + last, last ? 0 : h + 1);
            head(n, h, next);
        }
}

inline void attend(const Attention &a) {
    for_heads(a, {a.q, a.out}, {a.k, a.v}, [&](int64_t n, int64_t h, NextHead &next) { attend_head(a, n, h, next); });
}

inline void differentiate_attention(const Attention &a) {
    for_heads(a, {a.q, a.out, a.g, a.dq}, {a.k, a.v, a.dk, a.dv},
              [&](int64_t n, int64_t h, NextHead &next) { differentiate_head(a, n, h, next); });
}

}  // namespace tempo::TEMPO_ISA
