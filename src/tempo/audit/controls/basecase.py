"""The known-base case: networks fine-tuned from a public checkpoint, and how much of the private change was recovered.

For controls, curves and tests: `record` makes the evidence (a base, weights that drifted from it, a lab's session).
For every attack that knows a base: `newest` picks the calls, `Guess` is what it recovered of one, and `delta_figures`
scores guesses. Weights are flattened to matrices m×D here, a convolution's with D = d × taps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempo.audit import lab
from tempo.audit.attack import Curve, Evidence, Figure, NotApplicable
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.transcript import Call, View
from tempo.audit.truth import CallTruth, Truth
from tempo.wire.messages import Conv

LEAKS = 0.9
"""Delta errors from here down count as leaks; knowing the base alone gives exactly 1."""


def network(inputs: int = 96, width: int = 128, outputs: int = 64, seed: int = 0) -> nn.Module:
    """A small GELU network at its random start: independent weights tell their rows apart the least."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, outputs))


class Attention(nn.Module):
    """One attention head on sequences (N×T×width): query, key and value share an input, and so one ``A``."""

    def __init__(self, width: int = 64, outputs: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """N×T×outputs."""
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        output: Tensor = self.out(mixed)
        return output


def fine_tuned(base: nn.Module, drift: float, seed: int = 1) -> nn.Module:
    """A copy whose every matrix moved by Gaussian noise: ``‖W − W_base‖ = drift · ‖W_base‖`` exactly."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for w in tuned.parameters():
            if w.dim() > 1:
                change = torch.randn(w.shape, generator=generator)
                w.add_(change * (drift * w.norm() / change.norm()))
    return tuned


def record(
    base: nn.Module,
    drift: float = 0.0,
    *,
    inputs: Tensor | None = None,
    rows: int = 64,
    steps: int = 1,
    tuned: nn.Module | None = None,
    lr: float = 1e-4,
    **fields: Any,
) -> Evidence:
    """What the only worker saw of a network fine-tuned from ``base``, and an attacker that knows base and data.

    Args:
        base: The public network; left as it is.
        drift: How far each matrix has moved from it, unless ``tuned`` is given.
        inputs: Samples on axis 0; Gaussian rows for a network that begins with an `nn.Linear`, by default. The first
            half is the victim's, the second the attacker's.
        rows: How many default inputs a step has.
        steps: Recorded steps, each on a share of the victim's inputs; weights change by ``lr`` between them.
        tuned: The victim's network at its start, instead of a drifted copy.
        lr: Of the recorded steps: small, so that the drift stays what it was.
        fields: For `tempo.audit.lab.open_lab`: ``scheme="tempo"``, ``masks=…``, settings.
    """
    if inputs is None:
        first = next(module for module in base.modules() if isinstance(module, nn.Linear))
        inputs = torch.randn(2 * rows * steps, first.in_features, generator=torch.Generator().manual_seed(2))
    victim = copy.deepcopy(tuned) if tuned is not None else fine_tuned(base, drift)
    private, attackers = inputs.tensor_split(2)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in private.tensor_split(steps):
            yield batch, torch.zeros(len(batch))

    def loss(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
        output = model(x)
        scores: Tensor = getattr(output, "logits", output)
        return scores.square().mean()

    recorded = lab.train(victim, batches(), loss, lr=lr, **fields)
    public = {name: w.detach().clone() for name, w in base.state_dict().items()}
    data = Samples(attackers, torch.zeros(len(attackers), dtype=torch.long))
    knowledge = Knowledge(lambda: copy.deepcopy(base), public, data)
    return Evidence(recorded.views[0], knowledge, recorded.truth(victim))


def newest(view: View, knowledge: Knowledge) -> list[tuple[Call, Mapping[str, Tensor]]]:
    """The last call of each product that may come from a public weight, with the weights that it may come from.

    Raises:
        NotApplicable: There is none.
    """
    found: list[tuple[Call, Mapping[str, Tensor]]] = []
    for layer in view.layers:
        call = view.of(layer)[-1]
        if isinstance(call.product, Conv) and call.product.groups > 1:
            continue
        candidates = knowledge.base_candidates(tuple(call.w.shape))
        if candidates:
            found.append((call, candidates))
    if not found:
        raise NotApplicable("no product in this transcript has the shape of a public weight")
    return found


@dataclass(frozen=True)
class Guess:
    """What an attack makes of one product.

    Attributes:
        call: The call.
        candidates: Public weights that it may come from, by name.
        name: The one that it settled on.
        w: ``Ŵ``, the private weight in the public one's order, of its shape (m×d…), float64.
        rows: For each row of ``w~`` the row of the public weight; None if the attack assigns none.
        columns: The same of columns (input channels).
    """

    call: Call
    candidates: Mapping[str, Tensor] = field(repr=False)
    name: str
    w: Tensor = field(repr=False)
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def base(self) -> Tensor:
        """``W_base``."""
        return self.candidates[self.name]

    @property
    def drift(self) -> float:
        """``‖Ŵ − W_base‖ / ‖W_base‖``: how far the private weight seems to have moved; the attacker sees it."""
        return float((self.w - self.base).norm() / self.base.norm())


def best(guesses: Sequence[Guess]) -> Guess:
    """Of one product's guesses the one of least apparent drift: a wrong public weight is far from every ``Ŵ``."""
    return min(guesses, key=lambda guess: guess.drift)


def delta_error(w: Tensor, plain: Tensor, base: Tensor) -> float | None:
    """``‖Ŵ − W‖ / ‖W − W_base‖``: 0 is full recovery, 1 is no more than the base; None where nothing moved."""
    moved = (plain - base).norm()
    return None if moved < 1e-6 * base.norm() else float((w - plain).norm() / moved)


@dataclass(frozen=True)
class Scored:
    """One guess beside the truth."""

    guess: Guess
    error: float | None
    """Delta error; None where nothing moved."""

    alike: float
    """Cosine between the private change and the guessed one."""


def scored(guess: Guess, truth: Truth) -> Scored:
    """Compare with the true weight; the base is the candidate nearest to it, whichever the attack took."""
    behind = truth.of(guess.call)
    plain = behind["w"].double().flatten(1)
    held = held_rows(behind)
    base = _true_base(guess, behind).flatten(1)
    w = guess.w.flatten(1)[held]
    alike = torch.nn.functional.cosine_similarity((w - base).flatten(), (plain - base).flatten(), dim=0)
    return Scored(guess, delta_error(w, plain, base), float(alike))


def _true_base(guess: Guess, behind: CallTruth) -> Tensor:
    """The public weight that the private one comes from, in the rows that the worker holds."""
    held, plain = held_rows(behind), behind["w"].double()
    return min((each[held] for each in guess.candidates.values()), key=lambda part: float((plain - part).norm()))


def held_rows(behind: CallTruth) -> Tensor:
    """The output features that the worker holds: all, unless columns are split between operators."""
    columns = behind.get("columns")
    return torch.arange(behind["w"].shape[0]) if columns is None else columns.long()


def share_correct(assigned: Tensor, behind: CallTruth, which: Literal["A", "P"]) -> float:
    """Share of masked rows (``P``) or columns (``A``) assigned to the plain one that weighs most in them.

    Under a generalised permutation that is the share of correct assignments; chance is one over their number.
    """
    heaviest = behind.matrix(which).abs().argmax(1)
    if which == "P":
        heaviest = held_rows(behind)[heaviest]
    return float((assigned == heaviest).double().mean())


def delta_figures(guesses: Sequence[Guess], truth: Truth) -> list[Figure]:
    """Delta error of the product that leaks most, which decides; its median over products; likeness of the change.

    Raises:
        NotApplicable: No weight moved from its base.
    """
    results = [scored(guess, truth) for guess in guesses]
    errors = sorted(result.error for result in results if result.error is not None)
    if not errors:
        raise NotApplicable("no weight has moved from the public checkpoint: there is no private change to recover")
    return [
        Figure(
            name="delta error",
            value=errors[0],
            leaks=LEAKS,
            higher_leaks=False,
            chance=1.0,
            ceiling=0.0,
            meaning="error of the recovered weight beside the private change, of the product that leaks most; "
            "knowing the public checkpoint alone gives 1",
        ),
        Figure(
            name="delta error, median of products",
            value=errors[len(errors) // 2],
            higher_leaks=False,
            chance=1.0,
            ceiling=0.0,
            meaning="half of the products leak at least this much",
        ),
        Figure(
            name="cosine with the private change",
            value=max(result.alike for result in results if result.error is not None),
            chance=0.0,
            ceiling=1.0,
            meaning="direction of the recovered change, of the product that leaks most: 1 is the private one",
        ),
    ]


def assignment_figures(guesses: Sequence[Guess], truth: Truth) -> list[Figure]:
    """Share of rows and columns assigned correctly, over all products that assign any; then of each by itself."""
    right, chance, total = {"rows": 0, "columns": 0}, {"rows": 0.0, "columns": 0.0}, {"rows": 0, "columns": 0}
    for guess in guesses:
        behind = truth.of(guess.call)
        for name, axis, assigned in (("rows", 0, guess.rows), ("columns", 1, guess.columns)):
            if assigned is not None:
                right[name] += round(len(assigned) * share_correct(assigned, behind, "A" if axis else "P"))
                chance[name] += len(assigned) / guess.base.shape[axis]
                total[name] += len(assigned)
    axes = [name for name in total if total[name]]
    return [
        Figure(
            name=f"{' and '.join(names)} assigned correctly",
            value=sum(right[name] for name in names) / sum(total[name] for name in names),
            chance=sum(chance[name] for name in names) / sum(total[name] for name in names),
            ceiling=1.0,
            meaning=f"share of the {' and '.join(names)} of masked weights whose place in the public one is known",
        )
        for names in ([axes] if len(axes) > 1 else []) + [[name] for name in axes]
    ]


Undo = Callable[[Call, Mapping[str, Tensor]], Guess]
"""Makes a guess of a call, given the public weights that it may come from."""


def drift_curve(name: str, undo: Undo, guess: Guess, truth: Truth, drifts: Sequence[float]) -> Curve | None:
    """Delta error over drift: the same product, masks and direction of the private change, moved less or further.

    Args:
        name: Of the attack.
        undo: What the attack does with one call.
        guess: Of the product to vary.
        truth: The truth.
        drifts: ``‖W − W_base‖ / ‖W_base‖`` to try; at 0 there is no private change, so no error.

    Returns:
        The curve; None where the weight did not move at all.
    """
    behind = truth.of(guess.call)
    plain, held = behind["w"].double(), held_rows(behind)
    base = _true_base(guess, behind)
    if delta_error(plain, plain, base) is None:
        return None
    change = (plain - base) / (plain - base).norm() * base.norm()
    before, after = torch.linalg.inv(behind.matrix("P")).T, behind.matrix("A")

    def masked(w: Tensor) -> Tensor:
        return torch.einsum("ij,jk...,lk->il...", before, w, after)

    cloak = guess.call.w.double() - masked(plain)  # rounding, where there is no cloak
    errors: list[float | None] = []
    rows: list[float | None] = []
    for drift in drifts:
        w = base + drift * change
        stored = replace(guess.call.stored, tensors={"w": (masked(w) + cloak).float()})
        call = Call(stored, guess.call.forward, guess.call.backward)
        found = undo(call, guess.candidates)
        errors.append(delta_error(found.w.flatten(1)[held], w.flatten(1), base.flatten(1)))
        rows.append(None if found.rows is None else share_correct(found.rows, behind, "P"))
    series = {"delta error": errors}
    if any(share is not None for share in rows):
        series["rows assigned correctly"] = rows
    return Curve(
        title=f"{name}: recovery over drift",
        x_label="drift of the weight from the public checkpoint",
        y_label="delta error",
        x=list(drifts),
        series=series,
        leaks=LEAKS,
        higher_leaks=False,
        note="one product of this transcript, its private change scaled, under the masks that it had",
    )
