"""Scoring against a known base: the base alone gives 1, the truth 0, and public weights are found by shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit.attack import NotApplicable
from tempo.audit.attacks import REGISTRY
from tempo.audit.controls import basecase
from tempo.audit.knowledge import Knowledge
from tempo.audit.solvers.reference import plain_inputs


@pytest.fixture(scope="module")
def evidence():
    return basecase.record(basecase.network(), drift=0.05, steps=2, scheme="tempo")


def guesses(evidence, weight):
    return [
        basecase.Guess(call, candidates, name, weight(call, candidates[name]))
        for call, candidates in basecase.newest(evidence.view, evidence.knowledge)
        for name in candidates
    ]


def test_weights_drift_exactly_as_far_as_asked_and_barely_move_while_recorded():
    base = basecase.network()
    tuned = basecase.fine_tuned(base, 0.03)
    for then, now in zip(base.parameters(), tuned.parameters(), strict=True):
        if then.dim() > 1:
            assert float(((now - then).norm() / then.norm()).detach()) == pytest.approx(0.03, rel=1e-5)
    evidence = basecase.record(base, drift=0.03, steps=3, scheme="insecure-plain")
    for call in evidence.view.calls:
        assert evidence.view.steps == [0, 1, 2]
        name = {tuple(w.shape): w for w in evidence.knowledge.base.values()}
        moved = call.w.double() - name[tuple(call.w.shape)]
        assert float(moved.norm() / name[tuple(call.w.shape)].norm()) == pytest.approx(0.03, rel=1e-2)


def test_knowing_the_base_alone_scores_one_and_the_truth_scores_zero(evidence):
    public = basecase.delta_figures(guesses(evidence, lambda _, base: base), evidence.truth)
    assert public[0].value == pytest.approx(1.0)
    assert not public[0].leaking
    assert public[2].value == pytest.approx(0.0)
    known = basecase.delta_figures(guesses(evidence, lambda c, _: evidence.truth.of(c)["w"].double()), evidence.truth)
    assert known[0].value == 0.0
    assert known[0].leaking
    assert known[2].value == pytest.approx(1.0)


def test_assignments_are_scored_by_the_masks(evidence):
    right = []
    for guess in guesses(evidence, lambda _, base: base):
        behind = evidence.truth.of(guess.call)
        rows, columns = behind.permutation("P"), behind.permutation("A").flip(0)
        right.append(basecase.Guess(guess.call, guess.candidates, guess.name, guess.w, rows, columns))
    both, rows, columns = basecase.assignment_figures(right, evidence.truth)
    assert columns.value < both.value < rows.value
    assert rows.value == 1.0
    assert columns.value < 0.1
    assert rows.chance == pytest.approx(2 / (128 + 64))


def test_a_weight_that_never_moved_has_no_private_change(evidence):
    still = basecase.record(basecase.network(), drift=0.0, scheme="tempo", lr=0.0)
    with pytest.raises(NotApplicable, match="no private change"):
        basecase.delta_figures(guesses(still, lambda _, base: base), still.truth)


def test_public_weights_are_found_by_shape_stacked_flat_transposed_or_halved():
    q, k, v = (torch.randn(8, 6) for _ in range(3))
    conv = torch.randn(5, 6, 1, 1)
    knowledge = Knowledge(base={"q": q, "q.bias": q[0], "k": k, "v": v, "conv": conv, "last": torch.randn(6, 9)})
    stacked = knowledge.base_candidates((24, 6))
    assert list(stacked) == ["q + k + v"]
    assert torch.equal(stacked["q + k + v"], torch.cat([q, k, v]).double())
    assert torch.equal(knowledge.base_candidates((5, 6))["conv"], conv.flatten(1).double())
    assert list(knowledge.base_candidates((9, 6))) == ["last transposed"]
    assert list(knowledge.base_candidates((12, 6))) == ["q + k + v"]
    assert list(knowledge.base_candidates((4, 6))) == ["q", "k", "v"]
    assert knowledge.base_candidates((7, 7)) == {}
    assert Knowledge().base_candidates((8, 6)) == {}
    assert Knowledge(base={"w": torch.randn(4, 3, 3, 3)}).base_candidates((4, 3, 3, 3))


def test_a_base_of_other_shapes_is_not_applicable(evidence):
    other = Knowledge(base={"w": torch.randn(3, 5)})
    with pytest.raises(NotApplicable, match="shape of a public weight"):
        basecase.newest(evidence.view, other)


def test_convolutions_and_given_weights_can_be_recorded():
    base = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 8, 1))
    tuned = basecase.fine_tuned(base, 0.1, seed=5)
    evidence = basecase.record(base, tuned=tuned, inputs=torch.randn(4, 8, 6, 6), scheme="tempo")
    figures = basecase.delta_figures(guesses(evidence, lambda _, w: w), evidence.truth)
    assert figures[0].value == pytest.approx(1.0)


def test_products_are_named_although_the_scheme_kept_some_at_home():
    evidence = basecase.record(basecase.network(96, 128, 64), scheme="mix", mix_block=96)
    assert {tuple(call.w.shape) for call in evidence.view.calls} == {(128, 96)}
    assert list(evidence.knowledge.names(evidence.view).values()) == [["0"]]


def test_groups_are_named_once_they_travel_as_one():
    evidence = basecase.record(basecase.Attention(), inputs=torch.randn(24, 16, 64), steps=4, scheme="tempo")
    names = evidence.knowledge.names(evidence.view)
    assert sorted(names.values()) == [["out"], ["query", "key", "value"]]
    for layer, members in names.items():
        weight = evidence.knowledge.base_weight(members, tuple(evidence.view.of(layer)[0].w.shape))
        assert tuple(weight.shape) == tuple(evidence.view.of(layer)[-1].w.shape)
        assert evidence.truth.name(layer) == " + ".join(members)


@pytest.mark.parametrize("attack", ["signatures", "directions", "singular-vectors", "procrustes", "linking"])
def test_columns_divided_over_two_operators_are_attacked_and_hold(attack):
    fields = {"scheme": "mix-tuned", "workers": 2, "operators": 2}
    evidence = basecase.record(basecase.network(64, 96, 64), 0.05, steps=2, **fields)
    assert {call.w.shape[0] for call in evidence.view.calls} == {48, 32}
    finding = REGISTRY[attack]().run(evidence.view, evidence.knowledge, evidence.truth)
    # Second moments need the whole weight; the others find no more than chance.
    assert finding.verdict == ("not applicable" if attack == "procrustes" else "resisted")


def test_unfolded_convolutions_are_named_and_their_patches_known():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(32, 48, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(48, 32, 3))
    evidence = basecase.record(network, inputs=torch.randn(16, 32, 5, 5), scheme="mix", unfold=True)
    names = evidence.knowledge.names(evidence.view)
    assert evidence.knowledge.unfolds(evidence.view)
    assert sorted(names.values()) == [["0"], ["2"]]
    known = plain_inputs(evidence.view, evidence.knowledge)
    for layer, members in names.items():
        call = evidence.view.of(layer)[0]
        assert evidence.knowledge.base_weight(members, tuple(call.w.shape)).shape == call.w.shape
        assert known[layer].shape[1:] == call.x.shape[1:]
