"""The threat matrix says what the report says, and nothing else of a page changes."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo.audit.attack import Figure, Finding
from tempo.audit.report import matrix
from tempo.audit.report.contents import CONTROL, Report, Run, merged, read
from tempo.errors import AuditError

REPOSITORY = Path(__file__).parents[3]
REPORT = REPOSITORY / "benchmarks" / "audit" / "report.json"
MEASURED = REPORT.parent / "epyc-avx2-2026-11-24"


def finding(attack, knows, value, name="share of rows", **fields):
    figure = Figure(name=name, value=value, **{"leaks": 0.5, "chance": 0.0, "ceiling": 1.0} | fields)
    verdict = "broken" if figure.leaking else "resisted"
    return Finding(attack=attack, knows=knows, tries="Tries.", verdict=verdict, figures=[figure], reason="")


def delta(value):
    return finding("frames", ["base"], value, "delta error", leaks=0.8, chance=1.0, ceiling=0.0, higher_leaks=False)


def run(scheme, *findings, base="public", title="vit", facts=("architecture", "base", "data"), **fields):
    return Run(title=title, scheme=scheme, settings={}, base=base, facts=list(facts), findings=list(findings), **fields)


def report() -> Report:
    return Report(
        runs=[
            run("tempo", finding("patterns", [], 0.99), delta(0.0), drift=0.034),
            run("mix", finding("patterns", [], 0.02), delta(0.31), drift=0.034),
            run(
                "mix",
                finding("patterns", [], 0.04),
                Finding(attack="rank", knows=["architecture"], tries="", verdict="not applicable", reason="none"),
                base="secret",
                title="resnet",
                facts=("architecture", "data"),
            ),
            run(CONTROL, finding("patterns", [], 0.96875), title="controls"),
        ],
        command="tempo audit --run vit.toml",
        machine={"cpu": "EPYC", "date": "2026-11-24"},
    )


def docs(folder: Path, **pages: str) -> Path:
    (folder / "schemes").mkdir()
    (folder / "threat-model.md").write_text(pages.pop("threat_model", "# Threats\n"))
    for name, text in pages.items():
        (folder / "schemes" / f"{name}.md").write_text(text)
    return folder


def marked(name: str, inner: str = "") -> str:
    return f"Before.\n\n<!-- audit:{name} -->\n{inner}<!-- /audit:{name} -->\n\nAfter.\n"


def cells(text: str) -> dict[str, list[str]]:
    """Rows of the table by their first cell."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_a_scheme_s_table_says_what_resists_and_what_breaks_it(tmp_path):
    folder = docs(tmp_path, mix=marked("mix", "old\n"))
    file = folder / "schemes" / "mix.md"
    assert matrix.update(folder, report(), check=False) == [file]
    text = file.read_text()
    assert text.startswith("Before.\n\n<!-- audit:mix -->\n")
    assert text.endswith("<!-- /audit:mix -->\n\nAfter.\n")
    assert "old" not in text
    table = cells(text)
    assert table["nothing"] == ["nothing", "`patterns` 0.04<sup>1</sup>", "—"]  # the run where it got furthest
    assert table["base checkpoint"] == ["nothing", "—", "**`frames` 0.31<sup>2</sup>**"]
    assert table["architecture"][1] == "no attack applied"
    assert table["lies (active)"] == ["nothing", matrix.ACTIVE, "—"]
    for part in (
        "1. `patterns`: share of rows = 0.04; chance 0; in clear 1; a leak from 0.5 up; its control 0.969; ",
        "resnet, secret initial weights; broken in 0 of 2.",
        "2. `frames`: delta error = 0.31; chance 1; in clear 0; a leak from 0.8 down; ",
        "vit, public base at a drift of 3.4%.",
        "Measured 2026-11-24 (cpu EPYC; effort quick) by `tempo audit --run vit.toml`.",
    ):
        assert part in text, part


def test_the_summary_has_a_column_for_each_scheme(tmp_path):
    folder = docs(tmp_path, threat_model=marked("schemes"))
    matrix.update(folder, report(), check=False)
    table = cells((folder / "threat-model.md").read_text())
    assert table["the worker knows"] == ["`tempo`", "`mix`"]
    assert table["nothing"][0].startswith("**broken**: `patterns` 0.99<sup>")
    assert table["nothing"][1] == "resists `patterns` 0.04<sup>2</sup>, furthest of 2"
    assert table["architecture"] == ["**broken**, as with nothing", "no further attack"]
    assert table["base checkpoint"][1].startswith("**broken**: `frames` 0.31")
    assert table["base + data distribution"][1] == "**broken**, as with base checkpoint"


def seen_by(worker, *findings):
    return [msgspec.structs.replace(one, worker=worker) for one in findings]


def several() -> Report:
    """Of a scheme that was attacked by each operator, all together and on a simulator's view, on another machine."""
    idle = Finding(attack="rank", knows=["base"], tries="", verdict="not applicable", reason="no secret weight")
    views = {
        "each operator": [
            *seen_by("lab:0@first", finding("patterns", [], 0.03), idle),
            *seen_by("lab:1@second", finding("patterns", [], 0.04), idle),
        ],
        "all operators together": seen_by("both", finding("patterns", [], 0.97), idle),
        "a simulator": seen_by("a simulator", finding("patterns", [], 0.05), idle),
    }
    runs = [run("split", *found, attacker=who, drift=0.05, offloaded=0.9) for who, found in views.items()]
    elsewhere = Report(runs=runs, command="tempo audit --scheme split", machine={"cpu": "Xeon", "date": "2026-11-29"})
    return merged([report(), elsewhere])


def test_operators_by_themselves_and_together_are_two_columns_of_the_summary(tmp_path):
    folder = docs(tmp_path, threat_model=marked("schemes"))
    matrix.update(folder, several(), check=False)
    text = (folder / "threat-model.md").read_text()
    table = cells(text)
    assert table["the worker knows"][2:] == ["`split, each operator`", "`split, all operators together`"]
    each, together = table["nothing"][2:]
    assert each.startswith(f"{matrix.PROVEN}; resists `patterns` 0.04<sup>")
    assert together.startswith("**broken**: `patterns` 0.97<sup>")
    assert table["base checkpoint"][2] == f"{matrix.PROVEN}; no further attack"
    assert (
        "Measured 2026-11-24 (cpu EPYC; effort quick) by `tempo audit --run vit.toml`; "
        "`split` 2026-11-29 (cpu Xeon; effort quick) by `tempo audit --scheme split`. *Resists*"
    ) in text


def test_a_scheme_of_several_operators_is_shown_view_by_view(tmp_path):
    folder = docs(tmp_path, split=marked("split"))
    matrix.update(folder, several(), check=False)
    text = (folder / "schemes" / "split.md").read_text()
    table = cells(text)
    assert table["attack"][3:] == ["first", "second", "all operators together", "a simulator", "its control"]
    about = ["nothing", "share of rows", "from 0.5 up"]
    assert table["`patterns`"] == [*about, "0.03", "0.04", "**0.97**", "0.05", "**0.969**"]
    assert "vit, public base at a drift of 5.0%, 90% of the layers' FLOPs out" in text
    assert "* no secret weight: `rank`" in text
    assert "Measured 2026-11-29 (cpu Xeon; effort quick) by `tempo audit --scheme split`." in text
    assert "EPYC" not in text


def test_checking_finds_what_drifted_and_writes_nothing(tmp_path):
    folder = docs(tmp_path, mix=marked("mix"), tempo=marked("tempo"), other="# No marker\n")
    matrix.update(folder, report(), check=False)
    assert matrix.update(folder, report(), check=True) == []
    file = folder / "schemes" / "mix.md"
    file.write_text(file.read_text().replace("0.31", "0.99"))
    before = file.read_text()
    assert matrix.update(folder, report(), check=True) == [file]
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (marked("shares"), r"nothing about 'shares'; it has: mix, tempo"),
        ("<!-- audit:mix -->\n", "needs a <!-- /audit:NAME -->"),
        ("<!-- audit:mix -->\n<!-- /audit:tempo -->\n", "needs a <!-- /audit:NAME -->"),
        ("<!-- /audit:mix -->\n", "needs a <!-- /audit:NAME -->"),
    ],
)
def test_markers_that_cannot_be_filled_are_errors(tmp_path, text, said):
    with pytest.raises(AuditError, match=said):
        matrix.update(docs(tmp_path, mix=text), report(), check=True)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_name_breaks_a_table(tmp_path_factory, text):
    text = f"|<!-- /audit:mix -->`*{text}"
    named = Report(runs=[run("mix", finding(text, [], 0.9, name=text), title=text)], command=text, machine={text: text})
    folder = docs(tmp_path_factory.mktemp("docs"), mix=marked("mix"), tempo="")
    matrix.update(folder, named, check=False)
    assert matrix.update(folder, named, check=True) == []
    assert {len(row) for row in cells((folder / "schemes" / "mix.md").read_text()).values()} == {3}


def test_the_documentation_says_what_the_audit_found():
    folder = REPOSITORY / "docs"
    pages = [folder / "threat-model.md", *(folder / "schemes").glob("*.md")]
    if any("<!-- audit:" in page.read_text(encoding="utf-8") for page in pages):
        stale = matrix.update(folder, read(REPORT), check=True)
        assert stale == [], "write them anew: python -m tempo.audit.report.matrix docs benchmarks/audit/report.json"
    else:
        assert matrix.update(folder, Report(runs=[]), check=True) == []


def test_figures_of_weights_on_workers_are_those_measured():
    text = (REPOSITORY / "docs" / "threat-model.md").read_text(encoding="utf-8")
    table = cells(text.split("## Weights that live on workers")[1].split("\n## ")[0])
    for column, (scheme, update) in enumerate(
        (scheme, update) for scheme in ("tempo-signed", "mix") for update in ("trusted", "worker")
    ):
        runs = [r for r in read(MEASURED / f"updates-{update}.json").runs if (r.scheme, r.base) == (scheme, "secret")]
        found = {f.attack: f for r in runs for f in r.findings if f.figures}
        for attack in (
            "rekeying",
            "gradients-joint",
            "linking",
            "zero-rows",
            "information",
            "ica",
            "nmf",
            "covariance",
        ):
            figure = f"{found[attack].figures[0].value:.2g}"
            figure = f"**{figure}**" if found[attack].verdict == "broken" else figure
            assert table[f"`{attack}`"][column] == figure
    (curve,) = read(MEASURED / "rekeying.json").curves
    for name, series in zip(
        ("on workers, weight and momentum used", "on workers, momentum not used", "trusted updates"),
        curve.series.values(),
        strict=True,
    ):
        assert table[name] == [f"{value:.2f}" for value in series]
    (plain,) = read(MEASURED / "rekeying-plain-sgd.json").curves
    worker, trusted = (series[plain.x.index(16)] for series in plain.series.values())
    assert f"{worker:.2f} at the default rank, where trusted updates give {trusted:.2f}" in text
