"""What the person who audits hands over: facts of the attacker's, and the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file
from torch import Tensor, nn

from tempo.audit import truth as truths
from tempo.audit.knowledge import FACTS, Knowledge
from tempo.audit.samples import Samples
from tempo.audit.transcript import session_folder
from tempo.audit.truth import Truth
from tempo.errors import AuditError, SettingsError, nearest
from tempo.recipes import data, inference
from tempo.recipes import recipe as recipes

SAMPLES = 512
"""Images that attacker and scoring use at the most."""


@dataclass(frozen=True)
class Given:
    """The option ``--knows``: values by fact; empty for a fact without one."""

    values: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``architecture[=RECIPE],base=CHECKPOINT,data=SOURCE``.

        Raises:
            SettingsError: A fact is unknown or lacks its value.
        """
        values: dict[str, str] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in FACTS:
                raise SettingsError(f"--knows: unknown fact {name!r}; {nearest(name, FACTS)}")
            if name != "architecture" and not value:
                example = "CHECKPOINT" if name == "base" else "SOURCE"
                raise SettingsError(f"--knows: {name} needs a value: {name}={example}")
            values[name] = value
        if "architecture" in values and not (values["architecture"] or _is_run(values.get("base", ""))):
            raise SettingsError("--knows: architecture=RECIPE.toml, or base= with a checkpoint that has its recipe")
        return cls(values)

    def knowledge(self) -> Knowledge:
        """What the attacker knows, loaded."""
        return Knowledge(
            architecture=self._architecture() if "architecture" in self.values else None,
            base=_weights(Path(self.values["base"])) if "base" in self.values else None,
            data=self._samples() if "data" in self.values else None,
            trusted=self._recipe().session.trusted if "architecture" in self.values else (),
        )

    def truth(self, given: list[Path]) -> Truth | None:
        """What to score by: the folder of recorded truth, with the victim of a checkpoint if there is one."""
        folders = [path for path in given if _is_truth(path)]
        checkpoints = [path for path in given if path not in folders]
        if not given:
            return None
        if not folders:
            raise AuditError(
                "--truth: attacks are scored by the plain operands behind each message: give the folder that "
                "insecure_record_truth wrote, besides the checkpoint"
            )
        found = truths.read(folders[0])
        for path in checkpoints:
            trained = inference.load(path)
            source = data.load(trained.recipe.data.source)
            found.victim = trained.model
            found.members = Samples(
                trained.format.numbers(source.train.first(SAMPLES).images), source.train.first(SAMPLES).labels
            )
            found.test = Samples(
                trained.format.numbers(source.test.images[SAMPLES:]), source.test.labels[SAMPLES:]
            ).first(SAMPLES)
        return found

    def scheme(self, given: list[Path]) -> str:
        """The scheme's name, from the truth's manifest."""
        for path in given:
            if _is_truth(path):
                manifest = json.loads((session_folder(path) / "manifest.json").read_text())
                return str(manifest.get("scheme", "unknown"))
        return "unknown"

    def _recipe(self) -> recipes.Recipe:
        if file := self.values["architecture"]:
            return recipes.load(Path(file))
        return inference.recipe_of(inference.find(Path(self.values["base"])))

    def _architecture(self) -> Callable[[], nn.Module]:
        recipe = self._recipe()
        form = data.load(recipe.data.source).format(recipe.data.resize)
        return lambda: recipe.model.build(form.channels, form.size, len(form.classes))

    def _samples(self) -> Samples:
        """The first test images: not the victim's, and not those that scoring uses."""
        source = data.load(self.values["data"])
        resize = self._recipe().data.resize if "architecture" in self.values else 0
        images = source.test.first(SAMPLES)
        return Samples(source.format(resize).numbers(images.images), images.labels)


def _is_run(path: str) -> bool:
    return bool(path) and Path(path).is_dir()


def _is_truth(path: Path) -> bool:
    """Whether ``path`` was written by ``insecure_record_truth``: its manifest names a scheme."""
    manifests = [path / "manifest.json", *path.glob("*/manifest.json")]
    return any(file.is_file() and "scheme" in json.loads(file.read_text()) for file in manifests)


def _weights(path: Path) -> dict[str, Tensor]:
    """Parameters by name: of a checkpoint of ours, or of a safetensors file or folder."""
    file = path / "model.safetensors" if (path / "model.safetensors").is_file() else path
    if file.suffix == ".safetensors" and not (path / "state.json").is_file():
        weights: dict[str, Tensor] = load_file(file)
        return weights
    return inference.find(path).tensors["model"]
