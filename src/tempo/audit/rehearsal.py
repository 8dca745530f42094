"""Trains by a recipe with everything recorded, for audits: a victim, what its workers saw, and what an attacker knows.

The training images are divided: one part is public (it makes the public base), one is the victim's own, one is the
attacker's, of the same distribution. Two origins: ``secret`` starts from weights that nobody knows; ``public`` first
trains a base in plain on the public part, publishes it, and then fine-tunes it. Only the last steps are recorded, since
they leave the most to be learned: trained weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tempo import schemes
from tempo.audit import lab
from tempo.audit.adapters import adapted, change
from tempo.audit.attack import Effort
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.transcript import View
from tempo.audit.truth import Truth
from tempo.errors import SettingsError
from tempo.recipes import data
from tempo.recipes.data import Format, Images
from tempo.recipes.models import logits
from tempo.recipes.recipe import Recipe
from tempo.session import Session
from tempo.settings import Settings

Origin = Literal["secret", "public"]
ORIGINS: tuple[Origin, ...] = ("secret", "public")
TEST_SAMPLES = 512
"""Test images that scoring uses at the most."""

FINE_TUNING = 0.2
"""Fine-tuning's learning rate beside the recipe's."""


@dataclass(frozen=True)
class Lengths:
    """Steps of each phase: making the base, training or fine-tuning in plain, training under record."""

    base: int
    warm: int
    recorded: int


LENGTHS: dict[Effort, Lengths] = {"quick": Lengths(150, 60, 8), "full": Lengths(600, 200, 32)}


@dataclass(frozen=True)
class Parts:
    """Who has which images."""

    public: Images
    private: Images
    attacker: Images
    test: Images


def divide(source: data.Source) -> Parts:
    """Two fifths of the training images are public, two the victim's own, one the attacker's."""
    count = len(source.train)
    order = torch.randperm(count, generator=data.generator("audit", "parts"))
    cuts = [2 * count // 5, 4 * count // 5]
    public, private, attacker = (
        Images(source.train.images[part], source.train.labels[part]) for part in order.tensor_split(cuts)
    )
    return Parts(public, private, attacker, source.test.first(TEST_SAMPLES))


@dataclass(frozen=True)
class Start:
    """A model about to be trained under record."""

    origin: Origin
    model: nn.Module
    base: dict[str, Tensor] | None
    """The published weights, if it started from any."""


@dataclass(frozen=True)
class Rehearsed:
    """What came of training under record."""

    views: list[View]
    truth: Truth
    knowledge: Knowledge
    drift: float | None
    offloaded: float


class Rehearsal:
    """A recipe, its data in parts, and how long to train.

    Args:
        recipe: Model, data, optimizer and session.
        effort: How long.
        report: Called with a line before each stage.
    """

    def __init__(self, recipe: Recipe, effort: Effort, report: Callable[[str], None] = lambda _: None) -> None:
        self.recipe = recipe
        self.lengths = LENGTHS[effort]
        self._report = report
        source = data.load(recipe.data.source, recipe.data.train_limit, recipe.data.test_limit)
        self._format: Format = source.format(recipe.data.resize)
        self._parts = divide(source)

    def architecture(self) -> nn.Module:
        """A network of the recipe's kind; its weights mean nothing."""
        form = self._format
        return self.recipe.model.build(form.channels, form.size, len(form.classes))

    def start(self, origin: Origin) -> Start:
        """Train in plain up to the steps that will be recorded."""
        torch.manual_seed(self.recipe.run.seed)
        model = self.architecture()
        base = None
        if origin == "public":
            self._report(f"training a public base for {self.lengths.base} steps")
            self._train(model, self._parts.public, self.lengths.base)
            base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        steps = self.lengths.warm if base is not None else self.lengths.base + self.lengths.warm
        self._report(f"{'fine-tuning it' if base is not None else 'training'} in plain for {steps} steps")
        self._train(model, self._parts.private, steps, 1.0 if base is None else FINE_TUNING)
        return Start(origin, model, base)

    def record(self, start: Start, settings: Settings, workers: int = 1, preset_for: Origin | None = None) -> Rehearsed:
        """Train on under ``settings``, all of it recorded.

        Args:
            start: Where from; left as it is. Under schemes whose weights are public, adapters are trained beside it.
            settings: Scheme and the like.
            workers: How many workers, each of an operator of its own; under schemes that divide a product over
                operators, as many as take part in one.
            preset_for: For which origin the scheme's preset is chosen; the true one by default.
        """
        self._report(f"recording {self.lengths.recorded} steps under {settings.scheme}")
        model = copy.deepcopy(start.model)
        traits = schemes.create(settings.scheme, settings).traits
        if traits.public_weights:
            if start.base is None:
                raise SettingsError(f"audit: scheme {settings.scheme!r} is for public weights; use --origin public")
            model.load_state_dict(start.base)
            self._train(adapted(model), self._parts.private, self.lengths.warm)
            preset_for = "public"
        workers = traits.min_workers if traits.public_weights else max(workers, traits.min_workers)
        with lab.open_lab(workers, workers, settings=settings) as opened:
            opened.session.protect(model, base=preset_for or start.origin, trusted=settings.trusted)
            rate = 1.0 if start.base is None else FINE_TUNING
            self._train(model, self._parts.private, self.lengths.recorded, rate, opened.session)
            offloaded = opened.session.summary().offloaded_share
            opened.session.unprotect(model)
        model.eval()
        truth = opened.truth(model)
        truth.members, truth.test = (
            self._samples(self._parts.private.first(TEST_SAMPLES)),
            self._samples(self._parts.test),
        )
        knowledge = Knowledge(self.architecture, start.base, self._samples(self._parts.attacker), settings.trusted)
        drift = change(model) if traits.public_weights else _drift(model, start.base)
        return Rehearsed(opened.views, truth, knowledge, drift, offloaded)

    def _samples(self, images: Images) -> Samples:
        return Samples(self._format.numbers(images.images), images.labels)

    def _train(
        self, model: nn.Module, images: Images, steps: int, rate: float = 1.0, session: Session | None = None
    ) -> None:
        optimizer = self.recipe.optimizer.build(model)
        for group in optimizer.param_groups:
            group["lr"] *= rate
        if session is not None:
            session.optimizer(optimizer)
        order = data.Order(len(images), min(self.recipe.data.batch_size, len(images)), self.recipe.run.seed)
        torch.manual_seed(self.recipe.run.seed)
        model.train()
        for _ in range(steps):
            chosen = order.batch()
            batch = data.augment(
                self._format.numbers(images.images[chosen]), self.recipe.data.augment, order.randomness()
            )
            optimizer.zero_grad()
            F.cross_entropy(logits(model, batch), images.labels[chosen]).backward()
            optimizer.step()
            order.advance()


def _drift(model: nn.Module, base: dict[str, Tensor] | None) -> float | None:
    """``‖W − W_base‖ / ‖W_base‖`` over all matrices."""
    if base is None:
        return None
    pairs = [(p.detach(), base[name]) for name, p in model.named_parameters() if p.dim() > 1]
    moved = sum(float((now - then).double().square().sum()) for now, then in pairs)
    return float((moved / sum(float(then.double().square().sum()) for _, then in pairs)) ** 0.5)


def session_settings(recipe: Recipe, scheme: str, **changes: object) -> Settings:
    """The recipe's session under ``scheme``, all that can go out going out."""
    fields = {name: getattr(recipe.session, name) for name in Settings.__struct_fields__}
    return msgspec.convert(fields | {"scheme": scheme, "placement": "all"} | changes, Settings)


def publishes(recipe: Recipe, scheme: str) -> bool:
    """Whether ``scheme`` sends weights as they are, so that only a public base can be audited under it."""
    return schemes.create(scheme, session_settings(recipe, scheme)).traits.public_weights
