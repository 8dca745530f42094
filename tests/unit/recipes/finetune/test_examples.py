"""Records as tokens: what is learned, what is kept apart, and how batches look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from tempo.errors import DataError
from tempo.recipes.finetune.examples import IGNORED, Example, batch, prepare
from tempo.recipes.finetune.records import Record

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def letters(begin: bool = False, template: str | None = None) -> Any:
    """A tokenizer of single characters, which ends texts, and begins them if asked to."""
    vocabulary = {"[": 0, "]": 1, **{chr(c): c for c in range(32, 127) if chr(c) not in "[]"}, "\n": 10}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [], unk_token="?")), bos_token="[", eos_token="]"
    )
    if begin:
        begins = TemplateProcessing(single="[ $A", special_tokens=[("[", 0)])
        tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = template
    return tokenizer


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(f"data.jsonl:{number}", one) for number, one in enumerate(fields, 1)]


def learned(example: Example) -> str:
    return "".join(chr(token) if token > 1 else "[]"[token] for token in example.labels.tolist() if token != IGNORED)


def whole(example: Example) -> str:
    return "".join(chr(token) if token > 1 else "[]"[token] for token in example.ids.tolist())


def prepared(tokenizer: Any, *fields: dict[str, Any], length: int = 100) -> list[Example]:
    return prepare(records(*fields), tokenizer, length=length, validation=0, seed=0).train


@pytest.mark.parametrize("begin", [False, True])
def test_only_the_completion_is_learned_and_its_end(begin: bool) -> None:
    (example,) = prepared(letters(begin), {"prompt": "1+1=", "completion": "2"})
    assert whole(example) == ("[" if begin else "") + "1+1=2]"
    assert learned(example) == "2]"
    assert len(example.prompt) == len(whole(example)) - 2


def test_only_what_the_assistant_says_is_learned() -> None:
    says = ["hi", "yes?", "bye", "so long", "lost"]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(says)]
    (example,) = prepared(letters(template=TEMPLATE), {"messages": turns})
    assert whole(example) == "<u>hi\n<a>yes?\n<u>bye\n<a>so long\n"
    assert learned(example) == "yes?\nso long\n"
    assert len(example.prompt) == len("<u>hi\n<a>")


def test_a_template_that_is_missing_or_rewrites_turns_or_refuses_is_named_with_the_line() -> None:
    turns = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]}
    with pytest.raises(DataError, match=r"data.jsonl:1: .* has no chat template"):
        prepared(letters(), turns)
    with pytest.raises(DataError, match=r"data.jsonl:1: .* lays out earlier messages anew .* message 4"):
        prepared(letters(template="{{ (messages|length + 1) // 2 }}" + TEMPLATE), turns)
    with pytest.raises(DataError, match=r"data.jsonl:1: .* refuses these messages: no thanks"):
        prepared(letters(template="{{ raise_exception('no thanks') }}"), turns)


@given(st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(2, 20))
def test_plain_text_is_laid_end_to_end_and_nothing_is_lost_but_a_last_token(texts: list[str], length: int) -> None:
    found = prepared(letters(), *({"text": text} for text in texts), length=length)
    assert all(len(example.ids) == length for example in found[:-1])
    joined = "".join(map(whole, found))  # without its very end, if that stands alone: nothing learns it
    assert sorted(joined.removesuffix("]").split("]")) == sorted(texts)


def test_what_is_too_long_is_cut_and_said() -> None:
    short, long, hopeless = ({"prompt": "a" * count, "completion": "b" * 4} for count in (1, 6, 20))
    found = prepare(records(short, long, hopeless), letters(), length=8, validation=0, seed=0)
    assert sorted(map(whole, found.train)) == ["aaaaaabb", "abbbb]"]
    assert found.notes == [
        "2 of 3 training lines are longer than 8 tokens and cut; 1 of them have nothing to learn left, and are left out"
    ]
    with pytest.raises(DataError, match="nothing is left to learn of the training lines within 8 tokens"):
        prepared(letters(), hopeless, length=8)


def test_lines_kept_apart_depend_on_the_seed_alone_and_are_not_trained_on() -> None:
    lines = records(*({"prompt": f"{n}", "completion": "x"} for n in range(20)))
    first, again, other = (prepare(lines, letters(), length=9, validation=0.2, seed=seed) for seed in (1, 1, 2))
    apart = [set(map(whole, found.validation)) for found in (first, again, other)]
    assert apart[0] == apart[1] != apart[2]
    assert len(apart[0]) == 4
    assert apart[0] | set(map(whole, first.train)) == {f"{n}x]" for n in range(20)}
    assert not apart[0] & set(map(whole, first.train))
    with pytest.raises(DataError, match="is the only line"):
        prepare(lines[:1], letters(), length=9, validation=0.2, seed=0)


def test_rows_are_padded_to_a_multiple_where_nothing_is_learned() -> None:
    examples = prepared(letters(), {"prompt": "a", "completion": "b"}, {"prompt": "cc", "completion": "dd"})
    assert batch(examples, 4, most=6)["input_ids"].shape == (2, 6)
    rows = batch(examples, 4, most=100)
    assert {tuple(tensor.shape) for tensor in rows.values()} == {(2, 8)}
    assert rows["attention_mask"].sum(1).tolist() in ([3, 5], [5, 3])
    assert torch.equal((rows["labels"] != IGNORED).sum(1).sort().values, torch.tensor([2, 3]))
    assert bool((rows["labels"][rows["attention_mask"] == 0] == IGNORED).all())
