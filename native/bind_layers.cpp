#include "bind.h"

namespace {

using tempo::require;
using tempo::Activation;
using tempo::Attention;
using tempo::Heads;
using Flat = tempo::Array<const float, nb::c_contig, nb::device::cpu>;
using FlatOut = tempo::Array<float, nb::c_contig, nb::device::cpu>;
using Operand = tempo::Array<float, nb::ndim<4>, nb::device::cpu>;  // (samples, heads, tokens, features)
using Matrix = tempo::Array<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using MatrixOut = tempo::Array<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Angles = tempo::Array<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;  // (samples, tokens, features)
using Sums = tempo::Array<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Channels = tempo::Array<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = tempo::Array<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

Activation named(const std::string &name) {
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    require(name == "silu", "activations are gelu, gelu_tanh and silu");
    return Activation::silu;
}

void activation(const std::string &name, const Flat &x, const std::optional<Flat> &g, FlatOut &out) {
    const Activation kind = named(name);
    require(out.size() == x.size() && (!g || g->size() == x.size()), "operands have to be of one size");
    nb::gil_scoped_release released;
    tempo::active->activation(kind, x.data(), g ? g->data() : nullptr, out.data(), int64_t(x.size()));
}

// Of gated activations; `dup` comes with `g`.
void gated(const std::string &name, const Flat &x, const Flat &up, const std::optional<Flat> &g, FlatOut &out,
           std::optional<FlatOut> dup) {
    const Activation kind = named(name);
    const size_t size = x.size();
    require(g.has_value() == dup.has_value(), "there is a gradient of up where there is one to take it from");
    require(up.size() == size && out.size() == size && (!g || (g->size() == size && dup->size() == size)),
            "operands have to be of one size");
    nb::gil_scoped_release released;
    tempo::active->gated(kind, x.data(), up.data(), g ? g->data() : nullptr, out.data(), dup ? dup->data() : nullptr,
                         int64_t(size));
}

bool alike(const Matrix &a, const Matrix &b) { return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1); }

bool alike(const Matrix &a, const MatrixOut &b) { return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1); }

void rms_norm(const Matrix &x, const Flat &weight, const std::optional<Matrix> &g, const MatrixOut &out,
              const FlatOut &inverse, float eps) {
    require(x.shape(1) > 0 && weight.size() == x.shape(1), "there has to be one weight for each column");
    require(alike(x, out) && (!g || alike(x, *g)), "operands have to be of one shape");
    require(inverse.size() == x.shape(0), "there has to be one root mean square for each row");
    const tempo::RmsNorm a{x.data(),   weight.data(),       g ? g->data() : nullptr, out.data(), inverse.data(),
                           int64_t(x.shape(0)), int64_t(x.shape(1)), eps};
    nb::gil_scoped_release released;
    tempo::active->rms_norm(a);
}

// Where a channel's numbers are, or null.
const float *of_channels(const std::optional<Channels> &numbers, const Matrix &x) {
    require(!numbers || numbers->size() == x.shape(1), "there has to be one number for each channel");
    return numbers ? numbers->data() : nullptr;
}

void sum_channels(const Matrix &x, const std::optional<Matrix> &g, const std::optional<Matrix> &y,
                  const Channels &center, const std::optional<Channels> &scale, const std::optional<Channels> &shift,
                  const std::optional<MatrixOut> &passed, const Sums &sums) {
    require((!g || alike(x, *g)) && (!y || alike(x, *y)) && (!passed || alike(x, *passed)),
            "operands have to be of one shape");
    require(sums.shape(0) == 2 && sums.shape(1) == x.shape(1), "there have to be two sums for each channel");
    require(scale.has_value() == shift.has_value() && (g || !(scale || y)), "ReLU is where there is a gradient");
    require(y.has_value() == passed.has_value() && !(scale && y), "a sum's gradient is written, and passes ReLU once");
    tempo::ChannelSums a{};
    a.what = y ? tempo::Summed::through_relu_of_sum
             : scale ? tempo::Summed::through_relu
             : g ? tempo::Summed::gradients
                 : tempo::Summed::inputs;
    a.x = x.data(), a.g = g ? g->data() : nullptr, a.y = y ? y->data() : nullptr;
    a.center = of_channels(center, x), a.scale = of_channels(scale, x), a.shift = of_channels(shift, x);
    a.passed = passed ? passed->data() : nullptr, a.sums = sums.data();
    a.rows = int64_t(x.shape(0)), a.width = int64_t(x.shape(1));
    nb::gil_scoped_release released;
    tempo::active->sum_channels(a);
}

void normalize(const Matrix &x, const std::optional<Matrix> &residual, const Channels &scale, const Channels &shift,
               bool relu, const MatrixOut &out) {
    require(alike(x, out) && (!residual || alike(x, *residual)), "operands have to be of one shape");
    tempo::Normalization a{};
    a.x = x.data(), a.residual = residual ? residual->data() : nullptr, a.relu = relu, a.out = out.data();
    a.scale = of_channels(scale, x), a.shift = of_channels(shift, x);
    a.rows = int64_t(x.shape(0)), a.width = int64_t(x.shape(1));
    nb::gil_scoped_release released;
    tempo::active->normalize(a);
}

void normalize_gradient(const Matrix &x, const Matrix &g, const Channels &scale, const std::optional<Channels> &shift,
                        const std::optional<Channels> &center, const std::optional<Channels> &slope,
                        const std::optional<Channels> &mean, const MatrixOut &out) {
    require(alike(x, out) && alike(x, g), "operands have to be of one shape");
    require(center.has_value() == mean.has_value() && slope.has_value() == mean.has_value(),
            "center, slope and mean come together");
    tempo::Normalization a{};
    a.x = x.data(), a.g = g.data(), a.relu = shift.has_value(), a.out = out.data();
    a.scale = of_channels(scale, x), a.shift = of_channels(shift, x), a.center = of_channels(center, x);
    a.slope = of_channels(slope, x), a.mean = of_channels(mean, x);
    a.rows = int64_t(x.shape(0)), a.width = int64_t(x.shape(1));
    nb::gil_scoped_release released;
    tempo::active->normalize(a);
}

Heads heads_of(const Operand &x, const Operand &like, size_t heads) {
    require(x.shape(0) == like.shape(0) && x.shape(1) == heads && x.shape(3) == like.shape(3),
            "operands have to have the same samples, heads and features");
    require(x.stride(3) == 1, "features have to be contiguous");
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

Heads heads_of(const Operand &x, const Operand &like) { return heads_of(x, like, like.shape(1)); }

void rotate(const Operand &x, const Angles &cos, const Angles &sin, const Operand &out, bool back) {
    require(x.shape(3) % (2 * tempo::kWidths) == 0, "features have to be a multiple of 32");
    require(out.shape(2) == x.shape(2), "operands have to have the same tokens");
    for (const Angles *angles : {&cos, &sin})
        require((angles->shape(0) == x.shape(0) || angles->shape(0) == 1) && angles->shape(0) == cos.shape(0) &&
                    angles->shape(1) == x.shape(2) && angles->shape(2) == x.shape(3),
                "there have to be a cosine and a sine for each token and feature");
    tempo::Rotation a{};
    a.samples = int64_t(x.shape(0)), a.heads = int64_t(x.shape(1)), a.tokens = int64_t(x.shape(2));
    a.width = int64_t(x.shape(3)), a.x = heads_of(x, x), a.out = heads_of(out, x);
    a.cos = cos.data(), a.sin = sin.data(), a.sample = cos.shape(0) == 1 ? 0 : a.tokens * a.width, a.back = back;
    nb::gil_scoped_release released;
    tempo::active->rotate(a);
}

Attention attention_of(const Operand &q, const Operand &k, const Operand &v, const Operand &out, const Rows &lse,
                       float scale, bool causal) {
    Attention a{};
    a.samples = int64_t(q.shape(0)), a.heads = int64_t(q.shape(1)), a.queries = int64_t(q.shape(2));
    a.keys = int64_t(k.shape(2)), a.width = int64_t(q.shape(3));
    a.scale = scale, a.causal = causal;
    require(a.queries > 0 && a.keys > 0 && a.width % tempo::kWidths == 0,
            "there have to be queries and keys, and features a multiple of 16");
    require(k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0, "heads of queries have to be a multiple of those of keys");
    a.group = a.heads / int64_t(k.shape(1));
    require(v.shape(2) == k.shape(2) && out.shape(2) == q.shape(2), "operands have to have the same tokens");
    require(lse.shape(0) == q.shape(0) && lse.shape(1) == q.shape(1) && lse.shape(2) == q.shape(2),
            "there has to be one sum for each query");
    a.q = heads_of(q, q), a.k = heads_of(k, q, k.shape(1)), a.v = heads_of(v, q, k.shape(1)), a.out = heads_of(out, q);
    a.lse = lse.data();
    return a;
}

void run(Attention &a, void (*kernel)(const Attention &)) {
    a.memory = tempo::scratch(0, size_t(tempo::attention_floats(a)));
    kernel(a);
}

void attention(const Operand &q, const Operand &k, const Operand &v, const Operand &out, const Rows &lse, float scale,
               bool causal) {
    Attention a = attention_of(q, k, v, out, lse, scale, causal);
    nb::gil_scoped_release released;
    run(a, tempo::active->attend);
}

void attention_gradient(const Operand &g, const Operand &q, const Operand &k, const Operand &v, const Operand &out,
                        const Rows &lse, const Operand &dq, const Operand &dk, const Operand &dv, float scale,
                        bool causal) {
    Attention a = attention_of(q, k, v, out, lse, scale, causal);
    require(g.shape(2) == q.shape(2) && dq.shape(2) == q.shape(2) && dk.shape(2) == k.shape(2) &&
                dv.shape(2) == k.shape(2),
            "gradients have to have the tokens of what they are of");
    a.g = heads_of(g, q), a.dq = heads_of(dq, q), a.dk = heads_of(dk, q, k.shape(1)), a.dv = heads_of(dv, q, k.shape(1));
    nb::gil_scoped_release released;
    run(a, tempo::active->differentiate_attention);
}

}  // namespace

void tempo::bind_layers(nb::module_ &m) {
    m.def("activation", &activation, nb::arg("name"), nb::arg("x"), nb::arg("g").none(), nb::arg("out"));
    m.def("gated", &gated, nb::arg("name"), nb::arg("x"), nb::arg("up"), nb::arg("g").none(), nb::arg("out"),
          nb::arg("dup").none());
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("g").none(), nb::arg("out"),
          nb::arg("inverse"), nb::arg("eps"));
    m.def("sum_channels", &sum_channels, nb::arg("x"), nb::arg("g").none(), nb::arg("y").none(), nb::arg("center"),
          nb::arg("scale").none(), nb::arg("shift").none(), nb::arg("passed").none(), nb::arg("sums"));
    m.def("normalize", &normalize, nb::arg("x"), nb::arg("residual").none(), nb::arg("scale"), nb::arg("shift"),
          nb::arg("relu"), nb::arg("out"));
    m.def("normalize_gradient", &normalize_gradient, nb::arg("x"), nb::arg("g"), nb::arg("scale"),
          nb::arg("shift").none(), nb::arg("center").none(), nb::arg("slope").none(), nb::arg("mean").none(),
          nb::arg("out"));
    m.def("rotate", &rotate);
    m.def("attention", &attention);
    m.def("attention_gradient", &attention_gradient);
}
