"""Hugging Face models and tools, unchanged, through real workers: the numbers of plain PyTorch."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from tiny_models import IDS, MODELS, assert_same_gradients, gradients, make
from torch import Tensor, nn

from tempo.engine.stats import Stats
from tempo.errors import WeightAwayError
from tempo.layers.base import Protected
from tempo.session import Session

INPUTS_PER_STEP = {
    # Per block: q, k and v share one input; o; (gate and) up; down. BERT adds pooler and classifier, ViT its patches
    # and classifier, Llama its head.
    "bert": (2 * 6 + 2, 2 * 4 + 2),
    "vit": (2 * 6 + 2, 2 * 4 + 2),
    "llama": (2 * 7 + 1, 2 * 4 + 1),
    # GPT-2 has q, k and v in one layer; each ResNet block has its own input, but the first of a stage and its shortcut.
    "gpt2": (2 * 4 + 1, 2 * 4 + 1),
}


def offloaded(used: Stats) -> bool:
    return used.flops_offloaded > 0 and used.flops_trusted == 0


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_plain(connect, name):
    plain, batch = make(name).train(), MODELS[name][1]
    session = connect(2)
    model = session.protect(copy.deepcopy(plain))
    expected_loss, expected = gradients(plain, batch)
    for _ in range(2):  # the second time, layers that share their input do
        before = session.stats()
        loss, actual = gradients(model, batch)
        assert offloaded(session.stats() - before)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_same_gradients(actual, expected)


@pytest.mark.parametrize("name", INPUTS_PER_STEP)
def test_shared_inputs_are_sent_once_from_the_second_step_on(connect, name):
    session = connect()
    model = session.protect(make(name)).train()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    counts = []
    for _ in range(4):
        before = session.stats()
        gradients(model, MODELS[name][1])
        sgd.step()
        counts.append((session.stats() - before).encryptions)
    first, shared = INPUTS_PER_STEP[name]
    assert [c["x"] for c in counts] == [first, shared, shared, shared]
    # Two encryptions forward and one back for each input: the paper's count.
    assert all(c["w"] == c["x"] for c in counts)
    assert [c["g"] for c in counts] == [c["x"] for c in counts]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_generation_equals_plain(connect, name):
    plain = make(name).eval()
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(IDS, **options)
    torch.testing.assert_close(model.generate(IDS, **options), expected, rtol=0, atol=0)
    used = session.stats()
    assert offloaded(used)
    # Weights do not change while generating: each was sent once, alone, or once more with its neighbours.
    alone, shared = INPUTS_PER_STEP[name]
    assert used.encryptions["w"] <= alone + shared
    assert used.encryptions["g"] == 0


class Digits(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twenty images in memory."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.linspace(0, index, 3 * 16 * 16).sin().view(3, 16, 16)
        return {"pixel_values": image, "labels": torch.tensor(index % 3)}


def hf_losses(model: nn.Module, folder: Path) -> list[float]:
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=5,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=Digits(), eval_dataset=Digits())
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*history, trainer.evaluate()["eval_loss"]]


def test_trainer_runs_unchanged(connect, tmp_path):
    plain = make("vit")
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    expected = hf_losses(plain, tmp_path / "plain")
    losses = hf_losses(model, tmp_path / "protected")
    assert len(losses) == 6
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert offloaded(session.stats())
    stored = hf.ViTForImageClassification.from_pretrained(tmp_path / "protected/checkpoint-5")
    for (name, p), q in zip(stored.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name


def accelerate_losses(model: nn.Module, session: Session | None = None) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if session is not None:
        session.optimizer(optimizer)
    loader = torch.utils.data.DataLoader(Digits(), batch_size=4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            clip = accelerator.clip_grad_norm_ if session is None else session.clip_grad_norm_
            clip(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert accelerator.unwrap_model(model) is not None
    return losses


def test_accelerate_runs_unchanged(connect):
    plain = make("vit")
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    torch.testing.assert_close(
        torch.tensor(accelerate_losses(model)), torch.tensor(accelerate_losses(plain)), rtol=1e-4, atol=1e-6
    )
    assert offloaded(session.stats())


def test_weights_on_workers_under_accelerate_but_not_trainer(connect, tmp_path):
    """`Trainer` reads every gradient for its log: that raises, where the rest of the gradients would have misled."""
    plain = make("vit")
    session = connect(scheme="tempo-signed", update="worker", verify="off")
    model = session.protect(copy.deepcopy(plain))
    found = accelerate_losses(model, session)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(accelerate_losses(plain)), rtol=1e-4, atol=1e-6)
    assert session.stats().decryptions["w"] + len(session._engine.residences) > 0
    assert session.stats().decryptions["dw"] < session.stats().decryptions["dx"] / 2
    optimizer = session.optimizer(torch.optim.AdamW(model.parameters(), 1e-3))
    arguments = hf.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=Digits(), optimizers=(optimizer, None))
    with pytest.raises(WeightAwayError, match="gradient of its weight is on a worker"):
        trainer.train()


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_a_protected_model_is_stored_as_the_plain_one(connect, tmp_path, name):
    plain, batch = make(name).eval(), MODELS[name][1]
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "protected")
    config = json.loads((tmp_path / "protected/config.json").read_text())
    assert config == json.loads((tmp_path / "plain/config.json").read_text())
    assert config["architectures"] == [type(plain).__name__]
    assert (tmp_path / "protected/model.safetensors").read_bytes() == (
        tmp_path / "plain/model.safetensors"
    ).read_bytes()

    loaded = type(plain).from_pretrained(tmp_path / "protected").eval()
    assert not any(isinstance(module, Protected) for module in loaded.modules())
    with torch.no_grad():
        expected = plain(**batch).loss
        torch.testing.assert_close(loaded(**batch).loss, expected, rtol=0, atol=0)
        torch.testing.assert_close(session.protect(loaded)(**batch).loss, expected, rtol=1e-4, atol=0)
    assert offloaded(session.stats())
