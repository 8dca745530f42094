"""Changed plaintext never meets the same mask, and encryptions are as few as the paper says.

A ledger watches every label given out, every plaintext encoded under it, and the masks that were really drawn: by
their contents, so that it does not matter how they came to be.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tempo
from tempo.errors import WorkerOutOfMemoryError
from tempo.keys import Key, KeySchedule
from tempo.schemes.low_rank import LowRank
from tempo.schemes.masks import Mask, Masks
from tempo.schemes.single import MaskedInput, MaskedWeight, SingleMaskScheme
from tempo.session import Session

SIZES = [(8, 12), (12, 6)]
LAYERS = len(SIZES)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(*SIZES[0]), nn.GELU(), nn.Linear(*SIZES[1]))


def batch(seed: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def digest(*tensors: Tensor) -> bytes:
    return sha256(b"|".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).digest()


class Ledger:
    """What was given out, and what met what."""

    def __init__(self) -> None:
        self.labels: set[tuple[bytes, str]] = set()
        self.encoded: dict[tuple[bytes, str], bytes] = {}
        self.met: dict[tuple[str, str, bytes], bytes] = {}
        self.masks: Counter[str] = Counter()

    def label(self, key: Key) -> None:
        name = (key._root, key.label)
        assert name not in self.labels, f"label {key.label} given out twice"
        self.labels.add(name)

    def plaintext(self, key: Key, plain: Tensor) -> None:
        name = (key._root, key.label)
        assert name in self.labels, f"label {key.label} was not given out by a schedule"
        assert self.encoded.setdefault(name, digest(plain)) == digest(plain), f"label {key.label} met two plaintexts"

    def meets(self, role: str, mask: str, content: bytes, plain: Tensor) -> None:
        name = (role, mask, content)
        if name not in self.met:
            self.masks[f"{role}:{mask}"] += 1
        assert self.met.setdefault(name, digest(plain)) == digest(plain), f"mask {mask} met two plaintexts as {role}"


def content(*masks: Mask) -> bytes:
    return digest(*(tensor for mask in masks for tensor in mask.tensors("").values()))


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Watch all keys, encodings and masks of this process."""
    found = Ledger()

    def watch(owner: type, name: str, look: Callable[..., None], before: bool = True) -> None:
        original = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if before:
                look(self, *args, **kwargs)
            result = original(self, *args, **kwargs)
            if not before:
                look(result)
            return result

        monkeypatch.setattr(owner, name, wrapped)

    def masks_meet(
        masks: Masks, role: str, plain: Tensor, out: Tensor, *, plus: LowRank | None = None, **_: Any
    ) -> None:
        if plus is not None:  # fresh for every mask, as the product of its factors
            plain = plain + plus.low @ plus.up
        pair = {"x": (masks.L, masks.A), "w": (masks.P, masks.A), "g": (masks.L, masks.P)}[role]
        found.meets(role, "pair", content(*pair), plain)
        if role in "xg":  # and L by itself: it is fresh for every call, whatever happens to A and P
            found.meets(role, "L", content(masks.L), plain)

    watch(KeySchedule, "fresh", found.label, before=False)
    watch(Key, "branch", found.label, before=False)
    watch(SingleMaskScheme, "encode_weight", lambda _s, _p, w, key, *_: found.plaintext(key, w))
    watch(MaskedWeight, "encode_input", lambda _w, x, key, *_: found.plaintext(key, x))
    watch(MaskedInput, "encode_gradient", lambda _x, g, key, *_, **__: found.plaintext(key, g))
    watch(Masks, "encode", masks_meet)
    return found


@pytest.fixture
def check(ledger: Ledger, connect: Callable[..., Session]) -> Callable[..., Session]:
    """Run a scenario in a session of its own and compare its encryption counts, all per layer."""

    def run(scenario: Callable[[Session], object], x: int, w: int, g: int, **settings: Any) -> Session:
        session = connect(scheme="tempo", **settings)
        scenario(session)
        stats = session.stats()
        assert stats.encryptions == {"x": x * LAYERS, "w": w * LAYERS, "g": g * LAYERS}
        assert stats.flops_offloaded > 0
        assert stats.flops_trusted == 0
        drawn = [label for label in ledger.labels if "/verify-" not in label[1]]  # checks mask nothing
        assert len(ledger.encoded) == len(drawn)  # no label is drawn in vain
        return session

    return run


def test_a_training_step_encrypts_two_operands_forward_and_one_back(check):
    def steps(session):
        net = session.protect(model())
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        for seed in range(3):
            sgd.zero_grad()
            net(batch(seed)).square().sum().backward()
            sgd.step()

    check(steps, x=3, w=3, g=3)


def test_gradient_accumulation_keeps_the_masked_weight(check):
    def accumulate(session):
        net = session.protect(model())
        for seed in range(3):
            net(batch(seed)).square().sum().backward()

    check(accumulate, x=3, w=1, g=3)


def test_the_same_batch_again_is_masked_afresh(check, ledger):
    def twice(session):
        net = session.protect(model())
        for _ in range(2):
            net(batch(0)).square().sum().backward()

    check(twice, x=2, w=1, g=2)
    assert ledger.masks["x:L"] == ledger.masks["g:L"] == 2 * LAYERS


def test_a_module_called_twice_in_one_graph(check):
    def twice(session):
        net = session.protect(model())
        (net(batch(0)) * net(batch(1))).sum().backward()

    check(twice, x=2, w=1, g=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_a_call_of_its_own(check, reentrant):
    def recompute(session):
        net = session.protect(model())
        x = batch(0).requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()

    # Non-reentrant recomputation stops as soon as it has what it needs, which is after the last layer's input.
    check(recompute, x=2, w=1, g=1)


def test_evaluation_masks_a_weight_once(check):
    def evaluate(session):
        net = session.protect(model()).eval()
        for seed, mode in enumerate([torch.no_grad, torch.no_grad, torch.enable_grad, torch.no_grad]):
            with mode():
                net(batch(seed))

    check(evaluate, x=4, w=1, g=0)


def test_masks_expire_by_rows_served_in_evaluation_too(check, ledger):
    def evaluate(session):
        net = session.protect(model()).eval()
        with torch.no_grad():
            for seed in range(5):
                net(batch(seed))

    # Four rows at a time: the third and the fifth batch find eight served.
    check(evaluate, x=5, w=3, g=0, rekey_rows=8)
    assert ledger.masks["w:pair"] == 3 * LAYERS


def test_a_copy_has_labels_of_its_own(check, ledger):
    def both(session):
        net = session.protect(model())
        net(batch(0)).square().sum().backward()
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for p in twin.parameters():
                p += 1
        twin(batch(0)).square().sum().backward()

    check(both, x=2, w=2, g=2)
    assert ledger.masks["w:pair"] == 2 * LAYERS


def test_a_second_gradient_is_sent_under_fresh_masks(check):
    def retain(session):
        net = session.protect(model())
        y = net(batch(0))
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()

    check(retain, x=2, w=2, g=2)


def test_a_call_that_failed_is_repeated_under_fresh_masks(connect, ledger):
    session = connect(scheme="tempo")
    net = session.protect(nn.Linear(8, 8))
    link = session._engine.links[0]
    request, failed = link.request, []

    def out_of_memory(message, *rest):
        if type(message).__name__ == "Forward" and not failed:
            failed.append(message)
            raise WorkerOutOfMemoryError("worker 0: no room")
        return request(message, *rest)

    link.request = out_of_memory
    with pytest.raises(WorkerOutOfMemoryError):
        net(batch(0))
    net(batch(0))
    assert session.stats().encryptions == {"x": 2, "w": 2, "g": 0}
    assert ledger.masks["x:L"] == ledger.masks["w:pair"] == 2


def test_each_worker_s_rows_have_their_own_mask(connect, ledger):
    session = connect(3, scheme="tempo")
    session.protect(model())(batch(0, rows=30)).square().sum().backward()
    assert session.stats().encryptions == {"x": LAYERS, "w": LAYERS, "g": LAYERS}
    assert ledger.masks["x:L"] == 3 * LAYERS
    assert ledger.masks["w:pair"] == LAYERS


def test_layers_that_share_an_input_share_its_encryption_only(connect, ledger):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x)

    session = connect(scheme="tempo")
    net = session.protect(Shared())
    counts = []
    for seed in range(4):
        before = session.stats()
        net(batch(seed)).sum().backward()
        counts.append(tuple((session.stats() - before).encryptions.values()))
    assert counts == [(2, 2, 2), (1, 1, 1), (1, 0, 1), (1, 0, 1)]


def test_a_resumed_run_draws_keys_of_its_own(connect, ledger):
    def run() -> dict[str, Tensor]:
        torch.manual_seed(0)
        session = connect(scheme="tempo")
        net = session.protect(model())
        net(batch(0)).square().sum().backward()
        session.close()
        return net.state_dict()

    run()
    first = set(ledger.met)
    run()
    assert len(ledger.met) == 2 * len(first)  # the same plaintexts, under no mask that was there before
    assert len({nonce for nonce, _ in ledger.labels}) == 2


SMALL = {"mix_block": 2, "mix_row_block": 2, "insecure_small_blocks": True}
MIXED = {"mix": SMALL, "mix-tuned": SMALL | {"mix_cloak": 1}}


@pytest.mark.parametrize("operators", [1, 2])
@pytest.mark.parametrize("scheme", MIXED)
def test_covered_operands_never_meet_a_mask_twice(connect, ledger, scheme, operators):
    session = connect(3, operators, scheme=scheme, **MIXED[scheme])
    net = session.protect(model())
    for seed in range(3):
        x, seen = batch(seed, rows=30), torch.ones(30, 1)
        x[5:8], x[:, 3], seen[-4:] = 0, 0, 0
        (net(x) * seen).square().sum().backward()
    fresh = scheme == "mix-tuned"
    divided = fresh and operators == 2
    parts = 3  # each worker's rows, or all rows to one operator and the same in two parts to the other
    assert session.stats().encryptions == {"x": 3 * LAYERS, "w": (3 if fresh else 1) * LAYERS, "g": 3 * LAYERS}
    assert ledger.masks["x:L"] == ledger.masks["g:L"] == 3 * parts * LAYERS
    assert ledger.masks["w:pair"] == (3 if fresh else 1) * (2 if divided else 1) * LAYERS


@pytest.mark.parametrize("operators", [1, 2])
@pytest.mark.parametrize("scheme", MIXED)
def test_live_rows_sent_again_meet_masks_of_their_own(connect, ledger, scheme, operators):
    session = connect(2, operators, scheme=scheme, **MIXED[scheme])
    net = session.protect(model())
    for seed in range(2):  # twice through one graph: each time the live rows go out, and the whole gradient at last
        y = net(batch(seed, rows=60))
        y[:3].square().sum().backward(retain_graph=True)
        y[:5].square().sum().backward(retain_graph=True)
        y.square().sum().backward()
    # Forward and two repetitions; the whole gradient is the first to meet the forward call's masks.
    assert session.stats().encryptions["x"] == session.stats().encryptions["g"] == 3 * 2 * LAYERS
    # Two workers' rows, or both operators' halves: two row masks for every encryption, none of them used again.
    assert ledger.masks["x:L"] == 2 * session.stats().encryptions["x"]
    assert ledger.masks["g:L"] == 2 * session.stats().encryptions["g"]


def reciprocal(mask: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return mask[0], mask[1].reciprocal()


def apply(plain: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """``rows.scale[i] * columns.scale[j] * plain[rows.index[i], columns.index[j]]``."""
    scale = rows[1].float().unsqueeze(1) * columns[1].float()
    return plain[rows[0].long()][:, columns[0].long()] * scale


def test_truth_and_transcript_correspond_file_by_file(tmp_path: Path):
    folders = {"transcript": str(tmp_path / "seen"), "insecure_record_truth": str(tmp_path / "truth")}
    with tempo.connect(scheme="tempo", placement="all", divide_flops=1, local_workers=2, **folders) as session:
        net = session.protect(model())
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        for seed in range(2):
            sgd.zero_grad()
            net(batch(seed, rows=10).requires_grad_()).square().sum().backward()
            sgd.step()
        name = session.name
        assert session.stats().flops_offloaded > 0
    seen = {path.name: path for path in (tmp_path / "seen" / name).glob("*.safetensors")}
    truth = {path.name: path for path in (tmp_path / "truth" / name).glob("worker*/*.safetensors")}
    assert seen.keys() == truth.keys()
    operations = Counter(file.rpartition("-")[2].removesuffix(".safetensors") for file in seen)
    # Two steps, two layers, two workers.
    assert operations == {"store": 8, "forward": 8, "backward": 8}
    masks = {}  # a truth file of a forward call holds those of its store and its backward pass too
    for file in sorted(seen, key=lambda file: not file.endswith("-forward.safetensors")):
        masked, plain = load_file(seen[file]), load_file(truth[file])
        step, _, layer, operation = file.removesuffix(".safetensors").split("-")
        call = truth[file].parent, step, layer
        if operation == "forward":
            masks[call] = {m: (plain[f"{m}_permutation"], plain[f"{m}_scale"]) for m in "lap"}
        row, a, p = masks[call].values()
        around = {
            "x": (row, reciprocal(a)),
            "w": (reciprocal(p), a),
            "y": (row, reciprocal(p)),
            "g": (reciprocal(row), p),
            "dx": (reciprocal(row), a),
        }
        for role in masked.keys() - {"dw"}:
            expected = apply(plain[role], *around[role])
            if role in "xwg":  # masked here, so exactly this; the others come from a worker's product
                assert torch.equal(masked[role], expected), file
            torch.testing.assert_close(masked[role], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
