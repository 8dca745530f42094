"""Low-rank adapters beside frozen layers, for victims of schemes whose weights are public."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RANK = 8


class Beside(nn.Module):
    """``layer(x) + up(down(x))``: the layer frozen, what is beside it trained, from nothing (Hu et al., LoRA, 2022)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of the layer's output."""
        outputs: Tensor = self.layer(x) + self.up(self.down(x))
        return outputs


def change(model: nn.Module) -> float:
    """How much adapters change the weights that they are beside, relative, all together."""
    pairs = [((m.up.weight @ m.down.weight).detach(), m.layer.weight) for m in model.modules() if isinstance(m, Beside)]
    squares = [[float(w.double().square().sum()) for w in pair] for pair in pairs]
    return float((sum(delta for delta, _ in squares) / sum(whole for _, whole in squares)) ** 0.5)


def adapted(model: nn.Module) -> nn.Module:
    """Freeze ``model`` and put an adapter beside each of its fully connected layers, in place."""
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, Beside(module))
    return model
