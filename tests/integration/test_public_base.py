"""Under scheme `split`, workers that loaded the public base themselves are sent no weight."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tempo
from tempo.errors import SettingsError, WorkerLacksWeightError

ROWS = 64
BITS = 14
"""Other than the default, and such that rounding shows little."""
SPLIT: dict[str, Any] = {"scheme": "split", "placement": "all", "split_weight_bits": BITS}


class Block(nn.Module):
    """Three layers that share their input, one that stores its weight transposed, and an adapter that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, size) for size in (48, 16, 48))
        self.up, self.down = Conv1D(80, 48), nn.Linear(80, 48)
        self.requires_grad_(False)
        self.adapter = nn.Parameter(torch.zeros(48))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.adapter
        mixed = self.q(x) * self.k(x).repeat(1, 3) + self.v(x)
        return self.down(torch.relu(self.up(mixed)))


@pytest.fixture(scope="module")
def base() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture(scope="module")
def addresses(base: Block, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two workers of two operators with ``base`` in a folder of theirs."""
    folder = tmp_path_factory.mktemp("workers")
    save_file({name: p.detach().contiguous() for name, p in base.named_parameters()}, folder / "model.safetensors")
    processes = []
    for name in "ab":
        command = [sys.executable, "-m", "tempo.worker", "--listen", f"unix:{folder / name}", "--threads", "1"]
        command += ["--base", str(folder), "--base-bits", str(BITS)]
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            assert process.stderr is not None
            assert any("listening on" in line for line in process.stderr)
        yield [f"unix:{folder / name}@{name}" for name in "ab"]
    finally:
        for process in processes:
            process.terminate()
            process.communicate()


def step(model: Block) -> tuple[Tensor, Tensor]:
    """An output and the adapter's gradient, at the second call: layers that share their input are one product then."""
    torch.manual_seed(1)
    x = torch.randn(ROWS, 48)
    for _ in range(2):
        model.adapter.grad = None
        y = model(x)
        y.square().sum().backward()
    assert model.adapter.grad is not None
    return y.detach(), model.adapter.grad


def changed(model: Block) -> Block:
    """One whose weights no worker has."""
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(0.01 * torch.randn(p.shape))
    return other


def run(model: Block, addresses: list[str]) -> tuple[tuple[Tensor, Tensor], int]:
    """What `step` gives through workers, and the bytes of tensors that they were sent."""
    with tempo.connect(*addresses, base="public", **SPLIT) as session:
        before = session.stats()
        found = step(session.protect(copy.deepcopy(model)))
        stats = session.stats() - before
    assert stats.flops_offloaded > 0
    assert stats.flops_trusted == 0
    return found, stats.bytes_sent


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_of_the_base_do_not_travel(base: Block, addresses: list[str], autocast: bool) -> None:
    """Under autocast products are computed in bfloat16; integers are still those of the weights as they are."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (y, grad), known = run(base, addresses)
        _, unknown = run(changed(base), addresses)
    matrices = sum(p.numel() for p in base.parameters() if p.dim() == 2)
    alone = sum(p.numel() for p in (base.q.weight, base.k.weight, base.v.weight))  # at the first call
    assert unknown - known == 2 * 2 * (matrices + alone)  # to two workers, in two bytes
    bound = 2e-2 if autocast else 5e-3
    expected, gradient = step(base)
    assert (y - expected).norm() <= bound * expected.norm()
    assert (grad - gradient).norm() <= bound * gradient.norm()


def test_what_all_workers_have_goes_out_although_nobody_said_that_it_is_public(
    base: Block, addresses: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = copy.deepcopy(base)
    model.down.weight.data.add_(0.01 * torch.randn(48, 80))  # secret, or of another base
    with tempo.connect(*addresses, **SPLIT) as session:
        before = session.stats()
        y, grad = step(session.protect(copy.deepcopy(model)))
        stats, lines = session.stats() - before, str(session.summary()).splitlines()
    assert "every worker has 4 of 5 frozen weights" in caplog.text
    assert any("down" in line and "not every worker has its weight" in line for line in lines)
    assert stats.flops_trusted == 2 * 2 * ROWS * 80 * 48  # of two calls
    down = sum(p.numel() for p in (base.q.weight, base.k.weight, base.v.weight, base.up.weight))
    assert stats.flops_offloaded > 2 * 2 * ROWS * down
    expected, gradient = step(model)
    assert (y - expected).norm() <= 5e-3 * expected.norm()
    assert (grad - gradient).norm() <= 5e-3 * gradient.norm()


def test_what_no_worker_has_is_refused_until_somebody_says_that_it_is_public(base: Block, addresses: list[str]) -> None:
    with tempo.connect(*addresses, **SPLIT) as session:
        before = session.stats()
        for said, match in ("auto", "none here that every worker has"), ("secret", "choose one that hides weights"):
            model = changed(base)
            with pytest.raises(SettingsError, match=match):
                session.protect(model, base=said)
            assert type(model.q) is nn.Linear
        assert (session.stats() - before).bytes_sent == 0
        session.protect(changed(base), base="public")


def test_a_weight_that_a_worker_only_claimed_to_have_is_not_sent(
    base: Block, addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempo.connect(*addresses, **SPLIT) as session:
        monkeypatch.setattr(session._engine, "known", lambda digests: [True] * len(digests))  # as liars would have it
        model = session.protect(changed(base))
        before = session.stats()
        with pytest.raises(WorkerLacksWeightError, match=r"lacks its weight.* it was not sent"):
            model(torch.randn(ROWS, 48))
        assert (session.stats() - before).bytes_sent == 0
