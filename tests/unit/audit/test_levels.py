"""Findings, sorted by what an attacker must know."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo.audit.attack import Figure, Finding
from tempo.audit.controls import running
from tempo.audit.report import levels
from tempo.audit.report.contents import CONTROL, Report, Run
from tempo.audit.report.levels import LEVELS, level_of, number, progress, standing, subjects

NOTHING, ARCHITECTURE, DATA, BASE, BASE_DATA = LEVELS


def figure(value, leaks=0.5, chance=0.0, ceiling=1.0, higher_leaks=True):
    return Figure(name="share", value=value, leaks=leaks, chance=chance, ceiling=ceiling, higher_leaks=higher_leaks)


def finding(attack, knows, value, **fields):
    reached = figure(value, **fields)
    verdict = "broken" if reached.leaking else "resisted"
    return Finding(attack=attack, knows=knows, tries="Tries.", verdict=verdict, figures=[reached])


def run(*findings, scheme="mix", facts=("architecture", "base", "data"), settings=None):
    return Run(
        title="net", scheme=scheme, settings=settings or {}, base="public", facts=list(facts), findings=list(findings)
    )


@pytest.mark.parametrize(
    ("knows", "level"),
    [
        ([], NOTHING),
        (["architecture"], ARCHITECTURE),
        (["data"], DATA),
        (["architecture", "data"], DATA),
        (["base"], BASE),
        (["architecture", "base"], BASE),
        (["architecture", "base", "data"], BASE_DATA),
    ],
)
def test_an_attack_belongs_to_the_first_level_that_knows_enough(knows, level):
    assert level_of(finding("a", knows, 0.0)) is level


def test_whoever_knows_more_can_do_what_one_who_knows_less_can():
    audited = run(
        finding("blind", [], 0.1), finding("with base", ["base"], 0.9), finding("joint", ["base", "data"], 0.2)
    )
    verdicts = [standing([audited], level).verdict for level in LEVELS]
    assert verdicts == ["resisted", "resisted", "resisted", "broken", "broken"]
    both = standing([audited], BASE_DATA)
    assert (both.since, both.own, both.tried) == (BASE, BASE, 3)
    assert [standing([audited], level).inherited for level in LEVELS] == [False, True, True, False, True]


def test_the_furthest_attack_is_shown_by_its_place_between_chance_and_clear():
    near = finding("near", [], 1.1, leaks=0.8, chance=1.2, ceiling=0.0, higher_leaks=False)  # 0.08 of the way
    far = finding("far", [], 0.3)  # 0.3 of the way, though the smaller number
    stands = standing([run(near, far)], NOTHING)
    assert stands.decisive is not None
    assert stands.decisive[1].attack == "far"


def test_the_worst_run_counts():
    stands = standing([run(finding("a", [], 0.1)), run(finding("a", [], 0.9))], NOTHING)
    assert stands.verdict == "broken"


def test_what_nobody_tried_is_not_resisted():
    silent = Finding(attack="a", knows=[], tries="", verdict="not applicable", reason="nothing there")
    unscored = Finding(attack="a", knows=[], tries="", verdict="not scored", reason="no truth")
    assert standing([run()], NOTHING).verdict == "untried"
    assert standing([run(silent)], NOTHING).verdict == "not applicable"
    assert standing([run(silent, unscored)], NOTHING).verdict == "not scored"
    # An attacker without the base was not up to what one with it can do.
    assert standing([run(finding("a", [], 0.1), facts=["architecture"])], BASE).verdict == "untried"


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_progress_runs_from_chance_to_clear(value, chance, ceiling):
    reached = progress(figure(value, chance=chance, ceiling=ceiling))
    assert 0 <= reached <= 1
    if chance != ceiling:
        assert progress(figure(chance, chance=chance, ceiling=ceiling)) == 0
        assert progress(figure(ceiling, chance=chance, ceiling=ceiling)) == 1


def test_runs_of_one_scheme_are_told_apart_by_the_settings_in_which_they_differ():
    one = run(settings={"placement": "all", "trusted": "a"})
    two = run(settings={"placement": "all", "mix_rounds": "2", "trusted": "b"})  # which layers: of the model
    other = run(scheme="tempo", settings={"placement": "all"})
    control = run(scheme=CONTROL)
    found = subjects(Report(runs=[one, other, two, control]))
    assert found == {"mix": [one], "tempo": [other], "mix (mix_rounds = 2)": [two]}


def test_controls_are_run_as_a_part_of_the_report():
    done = running.run(["gram"])
    assert subjects(Report(runs=[done])) == {}
    found = levels.control_of(Report(runs=[run(), done]), "gram")
    assert found is not None
    assert found.verdict == "broken"
    assert found.figures[0].value >= 0.999
    assert "issue" in found.reason
    assert levels.control_of(Report(runs=[run()]), "gram") is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.99812, "0.998"),
        (-0.5, "−0.5"),
        (0, "0"),
        (1.0, "1"),
        (131072, "1.3×10⁵"),
        (4096, "4096"),
        (3.2e-15, "3.2×10⁻¹⁵"),
        (-1e-4, "−1×10⁻⁴"),
        (math.inf, "∞"),
        (math.nan, "undefined"),
    ],
)
def test_numbers_read_as_people_write_them(value, text):
    assert number(value) == text
