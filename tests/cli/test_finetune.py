"""`tempo finetune` on a tiny base: through workers and in plain, broken off, stopped early, and what it stores."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models
from typer.testing import CliRunner, Result

from tempo.cli import app
from tempo.errors import WorkerLostError
from tempo.recipes import metrics
from tempo.recipes.comparison import losses
from tempo.recipes.finetune import finetune as finetuning
from tempo.recipes.finetune import job as jobs
from tempo.recipes.metrics import Evaluation

# Versions of PEFT and transformers that do not know each other's latest names yet.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TRAINING = ("--steps", "12", "--evaluate-every", "4", "--batch-size", "4", "--length", "32", "--lr", "0.01")
TRAINING += ("--set", "run.sample_tokens=8")
DROPOUT = ("--set", "model.dropout=0.2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights that reads characters."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(c): c - 30 for c in range(32, 127)}}
    tokens = Tokenizer(models.BPE(vocabulary, [], unk_token=" "))
    tokens.decoder = decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = hf.LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **size)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty sums."""
    file = tmp_path / "private.jsonl"
    rows = ({"prompt": f"{n % 9}+{n % 7}=", "completion": f"{n % 9 + n % 7}"} for n in range(40))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def generate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def evaluations(folder: Path) -> list[Evaluation]:
    return [record for record in metrics.read(folder) if isinstance(record, Evaluation)]


def mean_loss(model: Any, rows: list[str], tokenizer: Any) -> float:
    """Of what comes after ``=`` in each row, token by token."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*tokenizer(row, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        start = row.index("=") + 1
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        count += len(logits)
    return total / count


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[str]:
    """The address of a worker whose answers are wrong."""
    address = f"unix:{tmp_path}/liar.sock"
    command = [sys.executable, "-m", "tempo.worker", "--listen", address, "--threads", "1", "--insecure-lie", "element"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any("listening" in line for line in process.stderr), "it did not start"
        yield address
        process.terminate()


def test_through_workers_one_of_which_lies_it_equals_plain_and_plain_peft_loads_it(
    base: Path, data: Path, tmp_path: Path, workers: list[str], liar: str
) -> None:
    chosen = ("--set", "session.placement=all", "--workers", f"{workers[0]}@a", f"{liar}@liar", f"{workers[1]}@b")
    result = run(*TRAINING, "--validation", "0.3", "--out", tmp_path / "out", *chosen, base, data)
    assert result.exit_code == 0, result.output
    plain = run(base, data, *TRAINING, "--validation", "0.3", "--plain", "--out", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output

    # Weights of 9 bits here, of 32 there.
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "plain"), rel=5e-3)
    measured = evaluations(tmp_path / "out")
    assert [record.step for record in measured] == [0, 4, 8, 12]
    assert measured[-1].loss < measured[0].loss
    for text in (
        "scheme split",
        "any 2 of the operators a, liar, b would",
        "validation at step 8: loss",
        "sample: ",
        "stored the",
    ):
        assert text in " ".join((result.output + (tmp_path / "out/summary.txt").read_text()).split()), text
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert all(record["bytes_sent"] > 0 for record in records if record["kind"] == "step")

    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    examples = jobs.prepare(jobs.read(data), tokenizer, length=32, validation=0.3, seed=0).validation
    rows = [tokenizer.decode(example.ids[:-1]) for example in examples]
    assert mean_loss(model, rows, tokenizer) == pytest.approx(min(record.loss for record in measured), rel=1e-3)


def test_a_run_that_was_killed_resumes_with_the_same_losses(base: Path, data: Path, tmp_path: Path) -> None:
    command = (base, data, *TRAINING, *DROPOUT, "--plain", "--set", "run.checkpoint_every=3", "--out", tmp_path / "out")
    assert run(*command).exit_code == 0
    straight, measured = losses(tmp_path / "out"), evaluations(tmp_path / "out")
    stored = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    # As a kill between the checkpoint of step 9 and that of step 12 leaves it.
    shutil.rmtree(tmp_path / "out/checkpoints/step-00000012")
    (tmp_path / "out/adapter_model.safetensors").unlink()
    again = run(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert "continuing from" in again.output
    assert losses(tmp_path / "out") == straight
    assert [(r.step, r.loss) for r in evaluations(tmp_path / "out")] == [(r.step, r.loss) for r in measured]
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == stored
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pkl"))

    other = run(*command, "--resume", "--rank", "8")
    assert other.exit_code == 1
    assert "model.rank: now 8, in the checkpoint 16" in other.output
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "1+1=", "completion": "3"}) + "\n")
    assert "private.jsonl holds something else now" in run(*command, "--resume").output


@pytest.mark.parametrize("measured", [False, True])  # before step 4 is measured, and after it
def test_ctrl_c_saves_and_says_how_to_go_on(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    command = (base, data, *TRAINING, *DROPOUT, "--plain")
    assert run(*command, "--out", tmp_path / "straight").exit_code == 0
    name = "sample" if measured else "one_step"
    original = getattr(finetuning, name)

    def interrupted(job: jobs.Job, *arguments: Any) -> Any:
        result = original(job, *arguments)
        if job.step == 4:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, name, interrupted)
        result = run(*command, "--out", tmp_path / "out")
    assert result.exit_code == 128 + signal.SIGINT
    assert "interrupted; step 4 is saved. Continue with: tempo finetune" in result.output
    assert [record.step for record in evaluations(tmp_path / "out")] == ([0, 4] if measured else [0])
    assert run(*command, "--out", tmp_path / "out", "--resume").exit_code == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")
    straight = [(record.step, record.loss) for record in evaluations(tmp_path / "straight")]
    assert [(record.step, record.loss) for record in evaluations(tmp_path / "out")] == straight


@pytest.mark.parametrize("moment", [4, 6])  # in a step, and while measuring after one
def test_workers_that_are_lost_cost_nothing(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    command = (base, data, *TRAINING, *DROPOUT, "--plain")
    assert run(*command, "--out", tmp_path / "straight").exit_code == 0
    score = jobs.score
    calls: list[Any] = []

    def lost(*arguments: Any) -> Any:
        calls.append(score(*arguments))  # moves the generators
        if len(calls) == moment:
            raise WorkerLostError("worker gpu-a:7070 is gone")
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "score", lost)
        result = run(*command, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "worker gpu-a:7070 is gone" in result.output
    assert f"Step {moment - 2} is saved" in result.output
    assert run(*command, "--out", tmp_path / "out", "--resume").exit_code == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "straight")


def test_less_memory_by_parts_of_a_batch_and_checkpointing_takes_the_same_steps(
    base: Path, data: Path, tmp_path: Path
) -> None:
    straight = (base, data, *TRAINING, "--validation", "0")
    assert run(*straight, "--plain", "--out", tmp_path / "straight").exit_code == 0
    sparing = ("--accumulation", "3", "--set", "model.gradient_checkpointing=true")  # parts of 2 and 2
    assert run(*straight, *sparing, "--plain", "--out", tmp_path / "plain").exit_code == 0
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
    protected = run(*straight, *sparing, "--set", "session.placement=all", "--out", tmp_path / "out")
    assert protected.exit_code == 0, protected.output
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "straight"), rel=5e-3)


def test_it_stops_when_the_loss_rises_and_stores_the_best(base: Path, data: Path, tmp_path: Path) -> None:
    options = ("--steps", "60", "--evaluate-every", "4", "--stop-after", "2", "--lr", "0.3", "--batch-size", "4")
    result = run(base, data, *options, "--plain", "--out", tmp_path / "out", "--validation", "0.4")
    assert result.exit_code == 0, result.output
    measured = evaluations(tmp_path / "out")
    best = min(measured, key=lambda record: record.loss)
    assert measured[-1].step == best.step + 8 < 60
    assert f"stopping: no lower loss than {best.loss:.4f} at step {best.step}" in result.output
    assert f"stored the adapter of step {best.step}, of loss {best.loss:.4f}" in result.output


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_text_and_conversations_with_a_sample_of_a_prompt(base: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "private.jsonl"
    says = {
        "text": "to be or not to be",
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
    }
    file.write_text((json.dumps({kind: says[kind]}) + "\n") * 8)
    result = run(
        *(base, file, "--plain", "--out", tmp_path / "out", "--epochs", "1", "--length", "16", "--lr", "0.01"),
        *("--batch-size", "4", "--prompt", "what now", "--set", "run.sample_tokens=8", "--targets", "q_proj,v_proj"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"sample: (u:)?what now(;a:)? \.\.\. ", result.output)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--targets", "q_prj"), "has no layer 'q_prj'; did you mean 'q_proj'?"),
        (("--set", "model.rnk=3"), "[model]: unknown key 'rnk'; did you mean 'rank'?"),
        (("--validation", "0.9"), "Expected `float` <= 0.5 - at `data.validation`"),
        (("--scheme", "splitt"), "did you mean 'split'?"),
    ],
)
def test_mistakes_are_named(base: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(base, data, "--out", tmp_path / "out", *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_base_or_data_that_is_not_there_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/base: no such folder" in run(tmp_path / "base", data).output
    assert f"{tmp_path}/none.jsonl: cannot read" in run(base, tmp_path / "none.jsonl").output
    (tmp_path / "pickled").mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled/pytorch_model.bin")
    assert "cannot load as a causal language model" in run(tmp_path / "pickled", data).output


def test_a_stored_adapter_answers_prompts_through_workers_as_in_plain(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert run(base, data, "--out", out, *TRAINING, "--plain").exit_code == 0
    ask = (base, "1+1=", "2+2=", "--adapter", out, "--tokens", "6", "--top-p", "0")
    protected = generate(*ask, "--set", "session.placement=all")
    assert protected.exit_code == 0, protected.output
    assert protected.output == generate(*ask, "--plain").output
    assert protected.output.count("1+1=") == protected.output.count("2+2=") == 1


def test_an_adapter_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    result = generate(base, "hello", "--adapter", tmp_path, "--plain")
    assert result.exit_code == 1
    assert "adapter_model.safetensors is missing" in result.output
