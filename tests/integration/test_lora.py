"""LoRA as people run it: PEFT, Trainer and TRL unchanged but for `protect`. Frozen layers go out, adapters stay.

Scheme `split` rounds the base's weights to integers, so all get a base whose weights integers give exactly: then the
numbers are those of plain PEFT.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import IDS, MODELS, assert_same_gradients, gradients, make
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from tempo.layers.base import Protected
from tempo.session import Session

# Versions of PEFT and transformers that do not know each other's latest names yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora-on-all": {"use_rslora": True, "target_modules": "all-linear", "bias": "lora_only", "lora_dropout": 0.1},
}


def adapted(name: str, adapters: int = 1, **options: Any) -> PeftModel:
    """A tiny model with adapters that already do something."""
    base = exact(make(name))
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = LoraConfig(
        r=4,
        task_type=task,
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    model = get_peft_model(base, config)
    for number in range(1, adapters):
        model.add_adapter(f"other{number}", copy.deepcopy(config))
    return model


def exact(base: nn.Module) -> nn.Module:
    """``base`` with weights that scheme `split` has no need to round: of one magnitude in a row, and either sign."""
    for module in base.modules():
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.t()
            weight.copy_(weight.sign() * weight.abs().mean(1, keepdim=True))
    return base


def in_session(connect, model: PeftModel, scheme: str = "split", **settings: Any) -> tuple[Session, PeftModel]:
    if scheme == "split":
        settings |= {"count": 2, "operators": 2, "base": "public"}
    session = connect(scheme=scheme, **settings)
    return session, session.protect(copy.deepcopy(model))


def assert_places(session: Session) -> None:
    """Frozen layers that were called went out, whatever belongs to an adapter stayed."""
    private = 0
    for line in session.summary().lines:
        part_of_adapter = ".lora_" in line.name or ".modules_to_save." in line.name
        assert bool(line.offloaded) != part_of_adapter or not (line.offloaded + line.trusted), line
        private += part_of_adapter
    assert private
    assert session.summary().offloaded_share > 0.5


def losses(model: nn.Module, batch: dict[str, Tensor], steps: int = 3, accumulate: int = 1) -> list[float]:
    """A plain training loop."""
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    found = []
    for step in range(steps * accumulate):
        loss = model(**batch).loss / accumulate
        loss.backward()
        found.append(loss.item())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "kind", "scheme"),
    [
        *itertools.product(["llama", "gpt2"], KINDS, ["split"]),
        ("bert", "lora", "split"),
        ("llama", "lora", "tempo"),
    ],
)
def test_losses_gradients_and_stored_adapters_equal_plain_peft(connect, tmp_path, name, kind, scheme):
    plain, batch = adapted(name, **KINDS[kind]), MODELS[name][1]
    session, model = in_session(connect, plain, scheme)
    torch.manual_seed(0)  # of dropout
    expected_loss, expected = gradients(plain, batch)
    torch.manual_seed(0)
    loss, actual = gradients(model, batch)
    assert any("lora_A" in key for key in actual)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same_gradients(actual, expected, tolerance=1e-4)
    assert losses(model, batch) == pytest.approx(losses(plain, batch), rel=1e-4)
    assert_places(session)

    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    stored = PeftModel.from_pretrained(exact(make(name)), tmp_path).eval()
    assert not any(isinstance(module, Protected) for module in stored.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, stored(**batch).logits, rtol=1e-4, atol=1e-5)


def test_one_of_two_adapters_trains_and_both_stay(connect):
    plain, batch = adapted("llama", adapters=2), MODELS["llama"][1]
    session, model = in_session(connect, plain)
    for active in ("other1", "default"):
        for one in (plain, model):
            one.set_adapter(active)
        assert losses(model, batch) == pytest.approx(losses(plain, batch), rel=1e-4)
    with plain.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss, rtol=1e-5, atol=0)
    assert_places(session)


def test_modules_to_save_train_here(connect):
    plain, batch = adapted("llama", modules_to_save=["lm_head"]), MODELS["llama"][1]
    session, model = in_session(connect, plain)
    assert losses(model, batch) == pytest.approx(losses(plain, batch), rel=1e-4)
    trained = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert trained
    assert all(not torch.equal(p, make("llama").lm_head.weight) for p in trained.values())
    assert_places(session)


def test_adapters_stay_when_they_are_frozen(connect):
    plain = adapted("llama", modules_to_save=["lm_head"]).requires_grad_(False).eval()
    session, model = in_session(connect, plain)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    assert_places(session)


def test_a_layer_with_an_adapter_merged_into_it_is_not_the_base_and_stays(connect):
    plain = adapted("llama", target_modules=["q_proj"]).eval()
    plain.merge_adapter()
    session, model = in_session(connect, plain)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    reasons = {line.reason for line in session.summary().lines if line.name.endswith("q_proj.base_layer")}
    assert reasons == {"an adapter is merged into it"}
    assert session.stats().flops_offloaded > 0


def test_an_output_layer_within_an_adapter_still_counts_as_the_last(connect):
    plain = adapted("llama", target_modules=["q_proj", "lm_head"])
    session, model = in_session(connect, plain, "tempo", placement="auto")
    session._engine.planner.placement = "all"  # anything pays off
    model(IDS)
    reasons = {line.name.rpartition("model.")[2]: line.reason for line in session.summary().lines}
    assert reasons["lm_head.base_layer"] == "last layer: the gradient of its output shows labels"
    assert reasons["layers.1.self_attn.q_proj.base_layer"] == "offloaded"


def test_an_adapter_added_to_a_protected_model_stays_too(connect):
    plain = exact(make("llama")).requires_grad_(False)
    session, model = in_session(connect, plain)
    sent = session.stats().flops_offloaded
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(model, copy.deepcopy(config))
    torch.manual_seed(0)
    plain = get_peft_model(plain, config)
    assert losses(model, MODELS["llama"][1]) == pytest.approx(losses(plain, MODELS["llama"][1]), rel=1e-4)
    assert session.stats().flops_offloaded > sent
    assert not [line.name for line in session.summary().lines if "lora" in line.name]


@pytest.mark.parametrize(("name", "reentrant"), [("llama", True), ("gpt2", False)])
def test_gradient_checkpointing_with_accumulation(connect, name, reentrant):
    plain, batch = adapted(name), MODELS[name][1]
    session, model = in_session(connect, plain)
    expected = losses(plain, batch, accumulate=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert losses(model, batch, accumulate=2) == pytest.approx(expected, rel=1e-4)
    assert_places(session)
    used = session.stats()
    assert used.encryptions["x"] > used.encryptions["g"]  # blocks were computed again


def test_autocast(connect):
    plain, batch = adapted("llama"), MODELS["llama"][1]
    session, model = in_session(connect, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (_, expected), (_, actual) = gradients(plain, batch), gradients(model, batch)
    # Every product is rounded to 8 bits, by either side in another order.
    assert_same_gradients(actual, expected, tolerance=5e-2)
    assert_places(session)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation(connect, name):
    plain = adapted(name).eval()
    session, model = in_session(connect, plain)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(input_ids=IDS, **options)
    torch.testing.assert_close(model.generate(input_ids=IDS, **options), expected, rtol=0, atol=0)
    assert_places(session)


# --- Trainer and TRL ----------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "seed": 3,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def history(trainer: hf.Trainer) -> list[float]:
    """Losses of a whole run, evaluation last."""
    trainer.train()
    return [
        *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        trainer.evaluate()["eval_loss"],
    ]


def test_trainer_runs_unchanged(connect, tmp_path):
    rows = [{"input_ids": IDS[0].roll(n), "labels": IDS[0].roll(n)} for n in range(8)]

    def train(model: PeftModel, folder: Path) -> list[float]:
        arguments = hf.TrainingArguments(str(folder), **ARGUMENTS)
        return history(hf.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2]))

    plain = adapted("llama")
    session, model = in_session(connect, plain)
    expected = train(plain, tmp_path / "plain")
    assert train(model, tmp_path / "protected") == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 3
    assert_places(session)


def words() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of 64 words, the letters w0 to w63."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w62", eos_token="w63", unk_token="w0")


@pytest.mark.parametrize("packing", [False, True])
def test_trl_runs_unchanged(connect, tmp_path, packing):
    texts = [" ".join(f"w{(n * k) % 60}" for n in range(5 + k)) for k in range(1, 17)]
    rows = Dataset.from_dict({"text": texts})

    def train(model: PeftModel, folder: Path) -> list[float]:
        arguments = SFTConfig(str(folder), **ARGUMENTS, packing=packing, max_length=32, dataset_text_field="text")
        trainer = SFTTrainer(
            model, arguments, train_dataset=rows, eval_dataset=rows.select(range(4)), processing_class=words()
        )
        return history(trainer)

    plain = adapted("llama")
    session, model = in_session(connect, plain)
    expected = train(plain, tmp_path / "plain")
    assert train(model, tmp_path / "protected") == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 3
    assert_places(session)
