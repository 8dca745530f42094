"""How far a product is off by what its operands and answers are rounded to on the wire, by scheme.

One product of 512 × 768 inputs, 768 × 768 weights, rounded as `int8` and `bfloat16` sessions round; relative errors of
Y, dX and dW as Frobenius norms. Operands are Gaussian, or have one feature in a hundred that is twenty times as large,
as activations of transformers do: a block of eight bits then keeps little of its other features, unless a scheme mixes
them.

    python benchmarks/wire/rounding.py [FILE.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from tempo import schemes
from tempo.engine.dtypes import answer_dtype, masked_dtype
from tempo.keys import KeySchedule
from tempo.schemes.base import Operand, Problem, Target
from tempo.schemes.reply import Passed
from tempo.wire.blocks import snap_
from tempo.wire.messages import Linear

SCHEMES = ("insecure-plain", "tempo", "tempo-signed", "mix", "mix-tuned")
ROWS, WIDTH = 512, 768


def empty(worker: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def errors(name: str, setting: str, x: Tensor, w: Tensor, g: Tensor) -> dict[str, float]:
    scheme, keys, target = schemes.create(name), KeySchedule(), [Target(0, "one", 1.0)]
    masked = masked_dtype(setting, x.dtype)

    def arrived(operands: list[Operand], what: str) -> Tensor:
        (operand,) = operands
        tensor = operand.tensors[what]
        return (snap_(tensor) if setting == "int8" else tensor).float()

    def answer(product: Tensor) -> dict[int, Passed]:
        return {0: Passed(product.to(answer_dtype(setting, masked)))}

    weight = scheme.encode_weight(Problem(Linear(), masked), w, keys.fresh(1, "w"), target, empty)
    source = weight.encode_input(x, keys.fresh(1, "x"), target, empty, lambda: w)
    gradient = source.encode_gradient(g, keys.fresh(1, "g"), empty, lambda: x, lambda: w, want_dw=True)
    W, X, G = arrived(weight.operands, "w"), arrived(source.operands, "x"), arrived(gradient.operands, "g")
    found = {
        "y": (source.decode_output(answer(X @ W.t()), [len(w)])[0], x @ w.t()),
        "dx": (gradient.decode_input_gradient(answer(G @ W)), g @ w),
        "dw": (gradient.decode_weight_gradient(answer(G.t() @ X), [len(w)])[0], g.t() @ x),
    }
    return {key: round(float((ours - plain).norm() / plain.norm()), 5) for key, (ours, plain) in found.items()}


def main(target: Path | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gaussian = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5, torch.randn(ROWS, WIDTH)
    outlying = gaussian[0].clone()
    outlying[:, ::100] *= 20
    results = {
        kind: {name: {s: errors(name, s, x, *gaussian[1:]) for s in ("int8", "bfloat16")} for name in SCHEMES}
        for kind, x in (("gaussian", gaussian[0]), ("outlying features", outlying))
    }
    text = json.dumps({"rows": ROWS, "width": WIDTH, "torch": torch.__version__, "results": results}, indent=1)
    print(text)
    if target is not None:
        target.write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
