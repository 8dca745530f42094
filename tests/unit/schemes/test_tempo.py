"""Scheme `tempo` against the formulas of the paper, element by element."""

from __future__ import annotations

import torch

from tempo.keys import KeySchedule
from tempo.schemes import create
from tempo.schemes.base import Problem, Target
from tempo.wire.messages import Linear


def test_encryption_follows_the_paper():
    m, n, p = 5, 4, 3
    X, W = torch.randn(m, n, dtype=torch.float64), torch.randn(n, p, dtype=torch.float64)
    G = torch.randn(m, p, dtype=torch.float64)
    keys, target = KeySchedule(), Target(0, "operator", 1.0)

    def empty(worker, shape, dtype):
        return torch.empty(shape, dtype=dtype)

    w = W.T.contiguous()
    weight = create("tempo").encode_weight(Problem(Linear(), torch.float64), w, keys.fresh(1, "w"), [target], empty)
    source = weight.encode_input(X, keys.fresh(1, "x"), [target], empty, lambda: w)
    gradient = source.encode_gradient(G, keys.fresh(1, "g"), empty, lambda: X, lambda: w, want_dw=True)
    secret = source.secrets(0)
    c_m, c_n, c_p = (secret[f"{axis}_scale"] for axis in "lap")
    pi_m, pi_n, pi_p = (secret[f"{axis}_permutation"].long() for axis in "lap")

    x, w, g = (
        source.operands[0].tensors["x"],
        weight.operands[0].tensors["w"].T,
        gradient.operands[0].tensors["g"],
    )
    Y, y = X @ W, x @ w
    for i in range(m):
        for j in range(n):
            assert torch.isclose(x[i, j], c_m[i] / c_n[j] * X[pi_m[i], pi_n[j]])
        for k in range(p):
            assert torch.isclose(y[i, k], c_m[i] / c_p[k] * Y[pi_m[i], pi_p[k]])
            # The key shift: G meets the inverse scales on the same permutations, and no new key.
            assert torch.isclose(g[i, k], c_p[k] / c_m[i] * G[pi_m[i], pi_p[k]])
    for j in range(n):
        for k in range(p):
            assert torch.isclose(w[j, k], c_n[j] / c_p[k] * W[pi_n[j], pi_p[k]])
