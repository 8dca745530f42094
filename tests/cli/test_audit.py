"""`tempo audit` as a user runs it: on a transcript that a worker wrote, and in one go."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tempo.audit.report import contents
from tempo.cli import app

RECIPE = """
[model]
name = "mlp"
width = 40
depth = 2

[data]
source = "digits"
batch_size = 32

[optimizer]
name = "sgd"
lr = 0.05

[run]
steps = 3

[session]
placement = "all"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)
    return file


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_transcript_of_a_real_worker_is_attacked_and_scored(recipe, tmp_path):
    run(
        *("train", recipe, "--scheme", "insecure-plain", "--out", tmp_path / "run"),
        *("--set", f"session.transcript={tmp_path / 'transcript'}", "--insecure-record-truth", tmp_path / "truth"),
    )
    file = tmp_path / "report.json"
    run(
        *("audit", tmp_path / "transcript", "--attack", "gram", "--json", file),
        *("--truth", tmp_path / "truth", "--truth", tmp_path / "run"),
        *("--knows", f"architecture={recipe},base={tmp_path / 'run'},data=digits"),
    )
    (audited,) = contents.read(file).runs
    (finding,) = audited.findings
    assert audited.scheme == "insecure-plain"
    assert audited.facts == ["architecture", "base", "data"]
    # In plain, inner products of rows are there to be read: were nothing offloaded, nothing would be found.
    assert finding.verdict == "broken"
    assert finding.figures[0].value > 0.999


def test_weights_that_live_on_a_real_worker_are_audited_like_others(recipe, tmp_path):
    run(
        *("train", recipe, "--scheme", "tempo-signed", "--update", "worker", "--out", tmp_path / "run"),
        *("--set", "session.rekey_rows=32"),
        *("--set", f"session.transcript={tmp_path / 'transcript'}", "--insecure-record-truth", tmp_path / "truth"),
    )
    file = tmp_path / "report.json"
    run(
        *("audit", tmp_path / "transcript", "--attack", "rekeying", "--truth", tmp_path / "truth"),
        *("--json", file),
    )
    (finding,) = contents.read(file).runs[0].findings
    figures = {figure.name: figure.value for figure in finding.figures}
    assert figures["masks linked"] == pytest.approx(1.0)
    # No step of training lies between: it is the weight that was fetched and sent again.
    assert figures["misfit"] < 1e-6


def test_without_the_truth_nothing_is_claimed(recipe, tmp_path):
    run("train", recipe, "--out", tmp_path / "run", "--set", f"session.transcript={tmp_path / 'transcript'}")
    file = tmp_path / "report.json"
    run("audit", tmp_path / "transcript", "--attack", "gram", "--json", file)
    (finding,) = contents.read(file).runs[0].findings
    assert finding.verdict == "not scored"
    assert "--truth" in finding.reason


def test_under_split_adapters_beside_a_public_base_are_audited_at_each_operator(recipe, tmp_path, monkeypatch):
    from tempo.audit import rehearsal

    monkeypatch.setitem(rehearsal.LENGTHS, "quick", rehearsal.Lengths(4, 2, 3))
    file = tmp_path / "report.json"
    run("audit", "--run", recipe, "--scheme", "split", "--attack", "gram", "--json", file, "--no-controls")
    runs = contents.read(file).runs
    for audited in runs:
        assert (audited.base, audited.scheme) == ("public", "split")
        assert audited.drift is not None
        assert audited.drift > 0
        assert audited.offloaded is not None
        assert audited.offloaded > 0.3
    verdicts = {audited.attacker: [finding.verdict for finding in audited.findings] for audited in runs}
    assert verdicts == {
        "each operator": ["resisted", "resisted"],
        "all operators together": ["broken"],
        "a simulator": ["resisted"],
    }


def test_train_record_and_attack_in_one_go(recipe, tmp_path, monkeypatch):
    from tempo.audit import rehearsal

    monkeypatch.setitem(rehearsal.LENGTHS, "quick", rehearsal.Lengths(4, 2, 3))
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    run(
        *("audit", "--run", recipe, "--scheme", "insecure-plain", "--scheme", "mix", "--attack", "gram"),
        *("--json", file, "--html", page, "--no-controls"),
    )
    report = contents.read(file)
    assert [(r.scheme, r.base) for r in report.runs] == [
        ("insecure-plain", "secret"),
        ("mix", "secret"),
        ("insecure-plain", "public"),
        ("mix", "public"),
    ]
    for audited in report.runs:
        assert audited.offloaded is not None
        assert audited.offloaded > 0.3
        assert (audited.drift is None) == (audited.base == "secret")
        assert audited.findings[0].verdict == ("broken" if audited.scheme == "insecure-plain" else "resisted")
    assert "gram" in page.read_text()
    merged = tmp_path / "merged.html"
    run("audit", "--merge", file, "--merge", file, "--html", merged, "--json", tmp_path / "merged.json")
    assert len(contents.read(tmp_path / "merged.json").runs) == 8
    assert merged.read_text().count("gram") > page.read_text().count("gram")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "TRANSCRIPT or --run"),
        (["nowhere"], "nowhere"),
        (["x", "--attack", "grams"], "'gram'"),
        (["x", "--knows", "bases=1"], "'base'"),
        (["x", "--knows", "base"], "base=CHECKPOINT"),
        (["x", "--knows", "architecture"], "architecture=RECIPE"),
    ],
)
def test_what_is_wrong_is_said(arguments, says):
    result = CliRunner().invoke(app, ["audit", *arguments])
    assert result.exit_code == 1
    assert says in result.output
