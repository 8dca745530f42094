"""The front door: connect to workers, protect a model, see what is protected and what it costs."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tempo import schemes
from tempo.conditions import conditions
from tempo.engine.away import follow_state, residence_of
from tempo.engine.coverage import TrustedProducts
from tempo.engine.crew import Incident
from tempo.engine.engine import Engine
from tempo.engine.link import Link
from tempo.engine.local import restart, start_local_workers
from tempo.engine.memory import keep_heap, onto_large_pages
from tempo.engine.recall import Recall
from tempo.engine.stats import Stats
from tempo.engine.truth import TruthRecorder
from tempo.errors import ProtectionWarning, SettingsError, WorkerError
from tempo.initial import Origin, origin
from tempo.layers.protect import ProtectedLayer, protect, unprotect
from tempo.optim.updates import Updates, clip_grad_norm_
from tempo.schemes.base import Scheme
from tempo.settings import Settings, parse
from tempo.summary import ProtectedModel, Summary
from tempo.wire.address import Address

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=torch.optim.Optimizer)  # noqa: E741 - of the optimizer

log = logging.getLogger("tempo")


def connect(*workers: str, settings: Settings | None = None, **fields: Any) -> Session:
    """Open a session with workers.

    Args:
        workers: Addresses, ``[group:]host:port[@operator]`` or ``unix:path``. With none, local workers are started;
            they end with this process, however it ends.
        settings: A whole settings object, instead of ``fields``.
        fields: Fields of `Settings`, ``placement="all"`` say.

    Returns:
        The session; use it as a context manager, or call `Session.close`.

    Raises:
        SettingsError: A setting or an address is wrong.
        SchemeError: The scheme does not work with these workers.
        IdentityError: There is no key pair, or a worker showed a certificate that is not one of its operator's.
        WorkerUnreachableError, WorkerRefusedError: A worker cannot be used; names it.
    """
    if settings is not None and fields:
        raise SettingsError(f"connect(): give settings= or single fields, not both ({', '.join(fields)})")
    settings = settings or parse(fields)
    addresses = [Address.parse(worker) for worker in workers]
    scheme = schemes.create(settings.scheme, settings)  # a wrong name should not start workers first
    name = secrets.token_hex(8)
    links: list[Link] = []
    try:
        if addresses:
            links.extend(Link.connect(address, settings=settings, session=name) for address in addresses)
        else:
            links.extend(start_local_workers(settings, session=name, operators=scheme.traits.min_workers))
        recall = Recall(partial(_dial_again, settings=settings, session=name))
        return Session(links, settings, name, recall)
    except BaseException:
        for link in links:
            link.close()
        raise


def _dial_again(lost: Link, *, settings: Settings, session: str) -> Link:
    if lost.process is not None:
        return restart(lost, settings, session=session)
    return Link.connect(lost.address, settings=settings, session=session)


class Session:
    """An open session: made by `connect`, closed by `close` or by leaving its ``with`` block.

    A session serves one thread at a time. It does not survive a fork; a child that uses it gets an error.

    Args:
        links: Connections to the workers, which the session closes.
        settings: Its settings.
        name: 16 hexadecimal digits, public: names the session in transcripts.
        recall: Seeks workers that were lost.
    """

    def __init__(self, links: Sequence[Link], settings: Settings, name: str, recall: Recall | None = None) -> None:
        keep_heap()
        folder = settings.insecure_record_truth
        truth = TruthRecorder(folder, name, settings.scheme) if folder else None
        self.name = name
        self._engine = Engine(settings, schemes.create(settings.scheme, settings), links, truth, recall)
        self._layers: list[ProtectedLayer] = []
        self._models: list[ProtectedModel] = []
        self._said: set[str] = set()
        self._presets: dict[str, Scheme] = {}
        self._updates = Updates(self._engine)
        self._hooks: dict[nn.Module, list[RemovableHandle]] = {}

    @property
    def settings(self) -> Settings:
        """What the session was opened with."""
        return self._engine.settings

    @property
    def incidents(self) -> list[Incident]:
        """Workers that left this session, oldest first, and why."""
        return list(self._engine.crew.incidents)

    def add_worker(self, address: str) -> None:
        """Let one more worker take part from the next product on, with a share by its measured speed.

        Args:
            address: As for `connect`.

        Raises:
            SettingsError: The address is wrong.
            IdentityError: It showed a certificate that is not one of its operator's.
            WorkerUnreachableError, WorkerRefusedError: It cannot be used, or its operator was found lying.
        """
        self._engine.check_open()
        link = Link.connect(Address.parse(address), settings=self.settings, session=self.name)
        self._engine.crew.join(link, self._engine.planner.share(link))

    def protect(
        self,
        model: M,
        *,
        base: Literal["auto", "public", "secret"] | None = None,
        trusted: Sequence[str] = (),
        offload: Sequence[str] = (),
    ) -> M:
        """Send the large linear operations of ``model`` to the workers from now on, under masks.

        In place: the same object, parameters and ``state_dict`` keys; its layers stay instances of their own types.

        Args:
            model: Any module with its parameters on the CPU.
            base: Whether workers may know nearly the weights that it starts from; None: as the settings say. Decides
                between `mix` and `mix-tuned` under ``scheme="mix"``. Under ``scheme="split"`` frozen weights are sent
                only if it is ``public``; with ``auto`` those are used that all workers loaded themselves.
            trusted: Modules to keep here, as shell patterns of their names, besides those of the settings.
            offload: Layers to send in spite of what they see, besides those of the settings.

        Returns:
            ``model`` itself.

        Raises:
            SettingsError: It is protected already, or a pattern matches nothing.
        """
        self._engine.check_open()
        elsewhere = next((f"{n} is on {p.device}" for n, p in model.named_parameters() if p.device.type != "cpu"), None)
        if elsewhere is not None:
            raise SettingsError(f"protect(): {elsewhere}; the trusted side runs on the CPU: call model.cpu() first")
        said = base or self.settings.base
        found = origin(model, said)
        for parameter in model.parameters():
            onto_large_pages(parameter)
        scheme = self._scheme_for(found)
        if scheme.traits.public_weights and said == "secret":
            raise SettingsError(
                f"protect(): scheme {scheme.name!r} sends frozen weights as they are: choose one that hides weights "
                "('mix'), or say base='public' if everyone may have them"
            )
        self._layers += protect(
            model,
            self._engine,
            scheme,
            [*self.settings.trusted, *trusted],
            [*self.settings.offload, *offload],
            declared=said == "public",
        )
        if self._engine.truth is not None:
            self._engine.truth.masked_by(scheme.name)
        self._models.append(ProtectedModel(model, scheme, found))
        self._warn_of_known_breaks(model, scheme, found)
        return model

    def optimizer(self, optimizer: O) -> O:
        """Let workers update the protected weights of ``optimizer``, if the setting ``update`` says so.

        It stays the same object, with its interface: ``step``, ``zero_grad``, ``param_groups``, ``state_dict``,
        schedulers. Weights of fully connected layers then live on a worker each, from one training call to the next;
        what would read a stale weight or a gradient that is not here raises `WeightAwayError`.

        Args:
            optimizer: Of parameters of models that are protected already.

        Returns:
            ``optimizer`` itself.

        Raises:
            UpdateError: Under ``update="worker"``: it is not exact under the masks of a model's scheme, or cannot be
                verified; names those that are and can.
        """
        self._engine.check_open()
        if self.settings.update == "trusted":
            return optimizer
        self.fetch_weights()  # those that another optimizer has had until now
        weights = self._weights_to_update()
        if self.settings.update == "auto" and not (weights := self._updates.for_free(optimizer, weights)):
            return optimizer
        for layer in self._layers:
            if layer.module not in self._hooks and any(p in weights for p in layer.module.parameters(recurse=False)):
                self._hooks[layer.module] = follow_state(layer.module)
        return self._updates.take(optimizer, weights)

    def clip_grad_norm_(self, parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, of gradients here and on workers.

        A worker tells the length of its gradient; a false one shifts the factor by no more than `Sketch.bounds` allows
        (docs/decisions/0017).

        Returns:
            The total norm before clipping.
        """
        return clip_grad_norm_([parameters] if isinstance(parameters, Tensor) else list(parameters), max_norm)

    def fetch_weights(self) -> None:
        """Bring all weights and gradients that live on workers back, until the next training call sends them anew.

        Raises:
            WeightsLostError: A worker is gone.
        """
        for residence in list(self._engine.residences):
            residence.recall()

    def abandon_lost_weights(self) -> None:
        """After `WeightsLostError`: let parameters hold what they held when they were last here.

        That is out of date: load a checkpoint into model and optimizer next.
        """
        for residence in list(self._engine.residences):
            if residence.lost is not None:
                residence.abandon()

    def unprotect(self, model: M) -> M:
        """Give ``model`` back as it was, with its present weights."""
        for residence in dict.fromkeys(filter(None, map(residence_of, model.parameters()))):
            residence.recall()
        unprotect(model)
        gone = set(model.modules())
        self._layers = [layer for layer in self._layers if layer.module not in gone]
        self._models = [protected for protected in self._models if protected.model not in gone]
        return model

    def summary(self) -> Summary:
        """What is protected, what stays trusted and why, with shares of the forward FLOPs seen so far."""
        return Summary(self._engine, self._layers, self._models)

    def stats(self) -> Stats:
        """Counts so far: encryptions, decryptions, FLOPs, bytes, seconds. Subtract two to measure a stretch."""
        return self._engine.snapshot()

    def trusted_products(self, model: nn.Module) -> TrustedProducts:
        """A context that lists every matrix product of ``model`` computed in the trusted process, with its FLOPs.

        Examples:
            >>> with session.trusted_products(model) as found:
            ...     model(batch).sum().backward()
            >>> print(found)
        """
        return TrustedProducts(model, self._engine.stats.running)

    def close(self) -> None:
        """Close the connections and stop local workers. Idempotent; protected models need a new session after it.

        Weights that live on workers are fetched first.
        """
        try:
            self.fetch_weights()
        except WorkerError as error:
            log.error("%s", str(error))
        finally:
            for hook in chain.from_iterable(self._hooks.values()):
                hook.remove()
            self._hooks.clear()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _weights_to_update(self) -> dict[nn.Parameter, Scheme]:
        """Weights of fully connected layers that may go out, each used in one place only; and what masks them."""
        uses = Counter(
            id(p)
            for protected in self._models
            for module in protected.model.modules()
            for p in module.parameters(recurse=False)
        )
        return {
            layer.module.weight: layer.site.scheme
            for layer in self._layers
            if layer.site is not None
            and layer.site.keep_trusted is None
            and isinstance(layer.module, nn.Linear)
            and type(layer.module.weight) is nn.Parameter
            and uses[id(layer.module.weight)] == 1
        }

    def _scheme_for(self, found: Origin) -> Scheme:
        """The session's scheme, or the one that stands in for it on a public base."""
        scheme = self._engine.scheme
        preset = scheme.traits.public_base_preset
        if not preset:
            return scheme
        if found.base == "public" and preset != scheme.name:
            if preset not in self._presets:
                self._presets[preset] = schemes.create(preset, self.settings)
                self._engine.crew.check(self._presets[preset])
            scheme = self._presets[preset]
        if (said := f"scheme {scheme.name!r}, base {found.base}: {found.why}") not in self._said:
            self._said.add(said)
            # Unless configured otherwise, Python shows warnings only: what costs more, or is not what was meant.
            log.log(logging.WARNING if found.base == "public" else logging.INFO, "%s", said)
        return scheme

    def _warn_of_known_breaks(self, model: nn.Module, scheme: Scheme, found: Origin) -> None:
        """Say once, specifically, what is known to break this scheme on this model."""
        if self.settings.insecure_no_tls:
            self._engine.warn_once(
                "insecure_no_tls: anyone on the way to the workers can read and change masked tensors",
                ProtectionWarning,
            )
        if self.settings.insecure_record_truth:
            self._engine.warn_once(
                f"insecure_record_truth: plain operands and masks are being written to "
                f"{self.settings.insecure_record_truth!r}",
                ProtectionWarning,
            )
        if self.settings.verify != "always":
            sampled = "finds faults, not liars: a wrong answer that is not in the sample is used, and sent on"
            told = "workers' answers are used as they are" if self.settings.verify == "off" else sampled
            self._engine.warn_once(f"verify={self.settings.verify!r}: {told}", ProtectionWarning)
        applies = conditions(model, found)
        for condition, message in scheme.traits.known_breaks.items():
            if condition in applies:
                self._engine.warn_once(f"scheme {scheme.name!r}: {message}", ProtectionWarning)
