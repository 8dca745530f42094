"""Records as sequences of tokens: what is learned of each, validation apart, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jinja2 import TemplateError
from torch import Tensor

from tempo.errors import DataError
from tempo.recipes import data
from tempo.recipes.finetune.records import Record

IGNORED: Final = -100
"""The label of a token that is not learned."""

_BEGINNING: Final = 16
"""Tokens of a plain text to go on from in a sample."""


@dataclass(frozen=True)
class Example:
    """A sequence of tokens, and the labels of those that are learned, int64."""

    ids: Tensor
    labels: Tensor

    @property
    def learned(self) -> int:
        """How many tokens are learned: the first is not, since nothing comes before it."""
        return int((self.labels[1:] != IGNORED).sum())

    @property
    def prompt(self) -> Tensor:
        """What comes before the first token that is learned, or a few tokens of plain text."""
        first = int((self.labels != IGNORED).nonzero()[0])
        return self.ids[: first if first > 1 else _BEGINNING]


@dataclass(frozen=True)
class Examples:
    """What to train on, and what to measure on."""

    train: list[Example]
    validation: list[Example]
    conversations: bool
    """Whether they were laid out by the tokenizer's chat template."""

    notes: list[str]
    """What a person should know of it."""


def prepare(records: Sequence[Record], tokenizer: Any, *, length: int, validation: float, seed: int) -> Examples:
    """Turn records into sequences of at most ``length`` tokens.

    Args:
        records: At least one.
        tokenizer: Of the base; its chat template lays out conversations.
        length: Tokens of a sequence, at most.
        validation: Share of the records to keep apart.
        seed: Decides which these are.

    Raises:
        DataError: There are too few, or one cannot be laid out; names its file and line.
    """
    order = torch.randperm(len(records), generator=data.generator("validation", seed)).tolist()
    apart = max(1, round(validation * len(records))) if validation else 0
    if apart >= len(records):
        raise DataError(
            f"{records[0].where}: is the only line, so none can be kept apart to measure on: "
            "give more lines, or --validation 0"
        )
    notes: list[str] = []
    parts = []
    for name, chosen in (("validation", order[:apart]), ("training", order[apart:])):
        tokens = [_tokens(records[number], tokenizer) for number in chosen]
        found = _pieces(tokens, length) if "text" in records[0].fields else _cut(tokens, length, name, notes)
        if tokens and not found:
            raise DataError(f"nothing is left to learn of the {name} lines within {length} tokens: raise --length")
        parts.append(found)
    return Examples(parts[1], parts[0], "messages" in records[0].fields, notes)


def batch(examples: Sequence[Example], pad_to: int, most: int) -> dict[str, Tensor]:
    """Examples as rows of ``input_ids``, ``attention_mask`` and ``labels``, int64, padded at their ends.

    Args:
        examples: None of more than ``most`` tokens.
        pad_to: The rows' length is a multiple of this, if that is not beyond ``most``.
        most: Tokens that the model can read at once.
    """
    longest = max(len(example.ids) for example in examples)
    width = min(most, -(-longest // pad_to) * pad_to)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        count = len(example.ids)
        ids[row, :count], mask[row, :count], labels[row, :count] = example.ids, 1, example.labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def start(tokenizer: Any) -> list[int]:
    """The tokens that ``tokenizer`` begins every text with."""
    return [token for token in tokenizer("")["input_ids"] if token != tokenizer.eos_token_id]


def chat(messages: list[dict[str, str]], tokenizer: Any, where: str, *, answer: bool) -> str:
    """A conversation in the layout of the tokenizer's template; ``answer``: up to where the assistant's turn begins."""
    if not tokenizer.chat_template:
        raise DataError(f"{where}: the base's tokenizer has no chat template; give 'prompt' and 'completion' instead")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except (TemplateError, ValueError) as error:
        raise DataError(f"{where}: the base's chat template refuses these messages: {error}") from None


def _tokens(record: Record, tokenizer: Any) -> Example:
    """One record whole."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in _parts(record, tokenizer):
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if learned else [IGNORED] * len(part)
    if "messages" not in record.fields:  # a template has its own beginning and end
        ids, labels = [*(first := start(tokenizer)), *ids], [*[IGNORED] * len(first), *labels]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    return Example(torch.tensor(ids), torch.tensor(labels))


def _parts(record: Record, tokenizer: Any) -> Iterable[tuple[str, bool]]:
    """Texts in their order, and whether each is learned."""
    match record.fields:
        case {"text": text}:
            return [(text, True)]
        case {"prompt": prompt, "completion": completion}:
            return [(prompt, False), (completion, True)]
    return _turns(record.fields["messages"], tokenizer, record.where)


def _turns(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Iterable[tuple[str, bool]]:
    parts, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat(messages[:number], tokenizer, where, answer=True)
        after = chat(messages[: number + 1], tokenizer, where, answer=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{where}: the base's chat template lays out earlier messages anew for later ones, so message "
                f"{number + 1} cannot be told apart: give 'prompt' and 'completion' instead"
            )
        parts += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return parts


def _pieces(texts: Sequence[Example], length: int) -> list[Example]:
    """Texts laid end to end, cut into pieces of ``length``: nothing is padded but the last."""
    if not texts:
        return []
    ids, labels = torch.cat([t.ids for t in texts]), torch.cat([t.labels for t in texts])
    pieces = [Example(*piece) for piece in zip(ids.split(length), labels.split(length), strict=True)]
    return [piece for piece in pieces if piece.learned]


def _cut(examples: Sequence[Example], length: int, name: str, notes: list[str]) -> list[Example]:
    """Each for itself, its end cut off beyond ``length``."""
    cut = [Example(example.ids[:length], example.labels[:length]) for example in examples]
    longer = sum(len(example.ids) > length for example in examples)
    kept = [example for example in cut if example.learned]
    if longer:
        lost = f"; {len(cut) - len(kept)} of them have nothing to learn left, and are left out" * (len(kept) < len(cut))
        notes.append(f"{longer} of {len(examples)} {name} lines are longer than {length} tokens and cut{lost}")
    return kept
