"""One benchmark: plain, protected, and protected against a worker that answers at once, in turn on the same cores."""

from __future__ import annotations

import copy
import math
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median
from typing import Any

import msgspec
import torch
from torch import Tensor

from tempo import kernels, schemes
from tempo.bench.memory import LayerBytes, copy_speed, masking, optimizing, travelling
from tempo.bench.workload import Workload
from tempo.bench.workloads import WORKLOADS
from tempo.engine.coverage import TrustedProducts
from tempo.engine.local import start_local_workers
from tempo.engine.memory import keep_heap, touch_heap
from tempo.engine.verifier import Verifier
from tempo.errors import SettingsError, nearest
from tempo.schemes.split import Split
from tempo.session import Session, connect
from tempo.settings import Settings
from tempo.verify.checks import Residual
from tempo.verify.policy import Policy
from tempo.verify.sketch import Sketch


class Measurement(msgspec.Struct, kw_only=True):
    """The outcome of one benchmark. Times are medians over the steps, in seconds.

    Under ``update="worker"`` masks expire once in ``period`` steps: whole periods are timed, and a time is the mean
    over one of the medians of its steps.
    """

    model: str
    description: str
    scheme: str
    update: str = "trusted"
    """Where weights are updated."""
    period: int = 1
    """Steps from one change of masks of a weight that lives on a worker to the next; most of the weights' elements
    have this one."""
    plain_step: float
    """The whole step in the trusted process: the pure-TEE baseline."""
    protected_step: float | None
    """With real workers, on this machine's other cores; None where that was not measured."""
    trusted_step: float
    """With a null worker: what the trusted side alone takes."""
    trusted_speedup: float
    """``plain_step / trusted_step``: the bound that an infinitely fast worker would give."""
    flop_bound: float
    """All matrix FLOPs over those that stay trusted: the bound if masks and all else cost nothing."""
    memory_bound: float = 0.0
    """``plain_step`` over what copying ``memory_bytes`` takes: the bound if all computing on the trusted side cost
    nothing beside its reading and writing. Holds for tensors larger than caches."""
    memory_bytes: int = 0
    """The least that the trusted side reads and writes in a step: every operand and its masked form, every answer and
    its result, what trusted layers take and give, forward and backward, and what the optimizer does, once each."""
    mask_memory_bytes: int = 0
    """Of ``memory_bytes``: to mask and unmask; the rest is trusted layers and the optimizer."""
    copy_bytes_per_s: float = 0.0
    """Read and written by the fastest large copy after the steps."""
    offloaded_flops_share: float
    mask_seconds: float
    """Of ``trusted_step``: masking and unmasking, keys included."""
    verify_seconds: float = 0.0
    """Of ``trusted_step``: checking what workers answered."""
    wire_seconds: float
    """Of ``trusted_step``: sending and waiting."""
    other_seconds: float
    """Of ``trusted_step``: trusted layers, optimizer, everything else."""
    attention_seconds: float = 0.0
    """Of ``other_seconds``, of a language model: its attention, measured by itself."""
    attention_flops: int = 0
    """Of the same."""
    bytes_up: int
    bytes_down: int
    weight_bytes_up: int = 0
    """Of ``bytes_up``: weights, and what optimizers keep of them."""
    weight_bytes_down: int = 0
    """Of ``bytes_down``: gradients of weights, and weights that come back."""
    least_bytes_up: int = 0
    """Of inputs and their outputs' gradients, each once in the wire's dtype; ``bytes_up`` without weights is more."""
    least_bytes_down: int = 0
    """Of outputs and gradients of inputs, likewise."""
    tokens: int = 0
    """In a batch, of a language model."""
    encryptions: dict[str, float]
    """Per step. ``w`` counts weights, and what optimizers keep of them and is sent along."""
    steps: int
    """How many were timed of each kind."""
    loss_difference: float | None
    """Relative difference between the protected and the plain loss of the first step."""
    machine: dict[str, str]


class _LenientPolicy(Policy):
    """Checks as ever and lets everything pass."""

    def agree(self, found: Tensor, expected: Tensor) -> bool:
        """Always, after looking."""
        super().agree(found, expected)
        return True


class _Lenient(Verifier):
    """Checks as ever and lets everything pass: a null worker's answers mean nothing."""

    def judge(self, address: str, step: int, name: str, answer: Tensor, residual: Residual) -> None:
        """Never an error."""

    def judge_norm(self, address: str, step: int, norm: float, sketch: Sketch) -> None:
        """Never an error."""


def machine() -> dict[str, str]:
    """Hardware, versions and date, to stand beside figures."""
    model = platform.processor() or "unknown"
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the generic name stays
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.selected(),
        "torch": str(torch.__version__),
        "tempo": version("tempo-train"),
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).date().isoformat(),
    }


def null_session(settings: Settings) -> Session:
    """A session with workers that answer at once: for what the trusted side takes alone."""
    name = secrets.token_hex(8)
    operators = schemes.create(settings.scheme, settings).traits.min_workers
    session = Session(start_local_workers(settings, session=name, null=True, operators=operators), settings, name)
    session._engine.verifier = _Lenient(settings.verify)
    if isinstance(session._engine.scheme, Split):
        session._engine.scheme.policy = _LenientPolicy(settings.verify)
    return session


def measure(
    name: str,
    settings: Settings,
    steps: int,
    report: Callable[[str], None],
    *,
    batch: int | None = None,
    real: bool = True,
) -> Measurement:
    """Benchmark the workload ``name`` under ``settings``, with one thread on every side.

    Args:
        name: A key of `WORKLOADS`.
        settings: Scheme and the like; placement ``auto`` decides as it would for a user.
        steps: Timed steps of each kind, at least, after some that are not.
        report: Called with a line before each stage.
        batch: Images or sequences in a batch; None: as many as the workload has by itself.
        real: Whether to take steps with real workers too.

    Raises:
        SettingsError: There is no such workload, or what it is built with is not installed.
    """
    if name not in WORKLOADS:
        raise SettingsError(f"bench: unknown model {name!r}; {nearest(name, WORKLOADS)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_heap()  # for both sides of every ratio
    try:
        with ExitStack() as stack:
            return _measure(name, _build(name, batch), settings, steps, report, stack, real)
    finally:
        torch.set_num_threads(threads)


def _build(name: str, batch: int | None) -> Workload:
    torch.manual_seed(0)
    try:
        return WORKLOADS[name]() if batch is None else WORKLOADS[name](batch)
    except ModuleNotFoundError as error:
        raise SettingsError(f"bench: model {name!r} is built with {error.name}: pip install {error.name}") from None


def _measure(
    name: str,
    workload: Workload,
    settings: Settings,
    steps: int,
    report: Callable[[str], None],
    stack: ExitStack,
    real: bool,
) -> Measurement:
    report(f"{workload.description}: starting workers")
    settings = msgspec.structs.replace(settings, local_threads=1)
    null = stack.enter_context(null_session(settings))
    plain_step = _Step(workload, copy.deepcopy(workload.model))
    null_step = _Step(workload, copy.deepcopy(workload.model), null)
    compared = [plain_step, null_step]
    plain_step.pick_memory_format()

    with TrustedProducts(plain_step.model) as everything:
        plain_loss = plain_step.run()
    difference = None
    if real:
        session = stack.enter_context(connect(settings=settings))
        real_step = _Step(workload, copy.deepcopy(workload.model), session)
        difference = abs(real_step.run() - plain_loss) / max(abs(plain_loss), 1e-6)
        compared.insert(1, real_step)
    null_step.run()
    touch_heap()
    with null.trusted_products(null_step.model) as trusted, LayerBytes(null_step.model) as layers:
        null_step.run()

    period = period_of(null)
    steps = math.ceil(steps / period) * period
    before = null.stats()
    attention = []
    for number in range(steps):
        report(f"{workload.description}: step {number + 1} of {steps}")
        for step in compared:
            step.run()
        if workload.attention:
            attention.append(workload.attention.seconds())
    used = null.stats() - before
    copies = [copy_speed() for _ in range(3)]  # not between steps, whose memory would move
    plain, alone = (per_step(step.times[-steps:], period) for step in (plain_step, null_step))
    scaled = alone / (sum(null_step.times[-steps:]) / steps)  # the split adds up to the median
    mask, verify, wire = (used.seconds[what] / steps * scaled for what in ("mask", "verify", "wire"))
    wire += used.seconds["worker"] / steps * scaled
    traits = null._engine.scheme.traits
    least = {name: size // steps for name, size in travelling(used, settings.wire_dtype, traits).items()}
    mask_memory = masking(used, settings.wire_dtype, traits) // steps
    memory = mask_memory + layers.total + optimizing(null_step.model)
    return Measurement(
        model=name,
        description=workload.description,
        scheme=settings.scheme,
        update=settings.update,
        period=period,
        plain_step=plain,
        protected_step=per_step(real_step.times[-steps:], period) if real else None,
        trusted_step=alone,
        trusted_speedup=plain / alone,
        flop_bound=everything.total / max(1, trusted.total),
        memory_bound=plain * max(copies) / memory,
        memory_bytes=memory,
        mask_memory_bytes=mask_memory,
        copy_bytes_per_s=max(copies),
        offloaded_flops_share=1 - trusted.total / everything.total,
        mask_seconds=mask,
        verify_seconds=verify,
        wire_seconds=wire,
        other_seconds=alone - mask - verify - wire,
        attention_seconds=median(attention) if attention else 0.0,
        attention_flops=workload.attention.flops if workload.attention else 0,
        bytes_up=used.bytes_sent // steps,
        bytes_down=used.bytes_received // steps,
        weight_bytes_up=least["w"],
        weight_bytes_down=least["dw"],
        least_bytes_up=least["x"] + least["g"],
        least_bytes_down=least["y"] + least["dx"],
        tokens=workload.attention.tokens if workload.attention else 0,
        encryptions={operand: count / steps for operand, count in used.encryptions.items()},
        steps=steps,
        loss_difference=difference,
        machine=machine(),
    )


def period_of(session: Session) -> int:
    """Steps between two changes of masks of weights that live on workers; 1 where none does."""
    elements: Counter[int] = Counter()
    for residence in session._engine.residences:
        per_step = residence.stored.rows_served / residence.steps
        elements[math.ceil(session.settings.rekey_rows / per_step)] += sum(p.numel() for p in residence.parameters)
    return max(elements, key=elements.__getitem__, default=1)


def per_step(times: Sequence[float], period: int) -> float:
    """The mean over a period of the median of each of its steps."""
    return sum(median(times[start::period]) for start in range(period)) / period


class _Step:
    """A training step of one copy of the model, and how long each took."""

    def __init__(self, workload: Workload, model: torch.nn.Module, session: Session | None = None) -> None:
        self.workload, self.model = workload, model
        if session is not None:
            session.protect(model, trusted=workload.trusted)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)  # PyTorch's fastest
        if session is not None:
            self._optimizer = session.optimizer(self._optimizer)
        self.times: list[float] = []

    def run(self) -> float:
        """Take one step; returns its loss."""
        start = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self.workload.loss(self.model)
        loss.backward()
        self._optimizer.step()
        self.times.append(time.perf_counter() - start)
        return float(loss.detach())

    def pick_memory_format(self) -> None:
        """Give the plain side its faster memory format; only convolutions care."""
        if not any(isinstance(module, torch.nn.Conv2d) for module in self.model.modules()):
            return
        start = copy.deepcopy(self.model.state_dict())
        formats: list[Any] = [torch.contiguous_format, torch.channels_last]
        fastest: dict[Any, float] = {}
        for layout in formats:
            self.model.to(memory_format=layout)  # type: ignore[call-overload]
            self.run()
            self.run()
            fastest[layout] = self.times[-1]
        self.model.to(memory_format=min(fastest, key=fastest.__getitem__))  # type: ignore[call-overload]
        self.model.load_state_dict(start)
        self._optimizer.state.clear()
