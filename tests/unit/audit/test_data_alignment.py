"""Known data distributions against masks of features."""

from __future__ import annotations

import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.data_alignment import DataAlignment, DataAlignmentBase, align, known_data
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples
from tempo.audit.solvers.reference import plain_inputs


def network():
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))


def record(x, **fields):
    torch.manual_seed(3)
    model = network()
    with lab.open_lab(rekey_rows=1 << 20, **fields) as opened:
        opened.session.protect(model, base="secret")
        for batch in x.split(len(x) // 4):
            model(batch)
        opened.session.unprotect(model)
    return opened, model


def knowledge(x, base=None):
    return Knowledge(network, base, Samples(x, torch.zeros(len(x), dtype=torch.int64)))


def figures(attack, opened, known):
    finding = attack().run(opened.views[0], known, opened.truth())
    return finding.verdict, {figure.name: figure.value for figure in finding.figures}


def test_row_mixing_does_not_save_a_product_whose_inputs_are_known_in_distribution():
    _, attacker, victim = known_data(rows=32768)
    opened, _ = record(victim, scheme="mix")
    verdict, found = figures(DataAlignment, opened, knowledge(attacker))
    assert verdict == "broken"
    assert found["row correlation of A"] > 0.8


def test_gaussian_data_gives_axes_but_no_signs():
    generator = torch.Generator().manual_seed(1)
    strength = 1.3 ** -torch.arange(32)
    attacker, victim = (torch.randn(256, 64, 32, generator=generator) * strength for _ in range(2))
    opened, _ = record(victim, scheme="mix")
    verdict, found = figures(DataAlignment, opened, knowledge(attacker))
    assert verdict == "resisted"
    assert found["row correlation of A"] < 0.45


def test_data_of_another_distribution_does_not_help():
    _, attacker, victim = known_data()
    opened, _ = record(victim, scheme="mix")
    other = attacker @ torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))[0]
    assert figures(DataAlignment, opened, knowledge(other))[0] == "resisted"


def test_only_inputs_that_no_weight_touched_are_known_without_the_base():
    _, attacker, victim = known_data(rows=4096)
    opened, model = record(victim, scheme="mix")
    view = opened.views[0]
    first, second = view.layers
    assert list(plain_inputs(view, knowledge(attacker))) == [first]
    known = plain_inputs(view, knowledge(attacker, model.state_dict()))
    torch.testing.assert_close(known[second], nn.functional.gelu(model[0](attacker)).flatten(0, 1))


def test_the_base_opens_deeper_products():
    _, attacker, victim = known_data(rows=32768)
    opened, model = record(victim, scheme="mix", trusted=("0",))
    assert figures(DataAlignmentBase, opened, knowledge(attacker, model.state_dict()))[0] == "broken"


def test_alignment_is_exact_up_to_sampling():
    _, attacker, victim = known_data()
    A = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    found = align(victim.double().flatten(0, 1) @ A.T, attacker.double().flatten(0, 1))
    assert nn.functional.cosine_similarity(found, A).min() > 0.95
