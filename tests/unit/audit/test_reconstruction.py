"""Pictures that a worker can form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempo.audit import lab
from tempo.audit.attacks.reconstruction import Reconstruction, ReconstructionBase
from tempo.audit.controls.toys import dead_leaves
from tempo.audit.knowledge import Knowledge
from tempo.audit.samples import Samples

PICTURES = dead_leaves(320, 1, 12, torch.Generator().manual_seed(1)) - 0.5
OWN, VICTIMS = Samples(PICTURES[:256], torch.zeros(256, dtype=torch.int64)), PICTURES[256:]


class Tokens(nn.Module):
    """Four tokens for each picture, as a ViT's embedding makes them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 48, 6, 6)
        self.mix = nn.Linear(48, 48)

    def forward(self, x):
        return self.mix(self.embed(x).flatten(2).mT)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 144), nn.ReLU(), nn.Linear(144, 32))


def run(attack, architecture, *, trusted=(), base=False, x=VICTIMS, **fields):
    torch.manual_seed(2)
    model = architecture()
    with lab.open_lab(**fields) as opened:
        opened.session.protect(model, base="secret", trusted=trusted)
        model(x)
        opened.session.unprotect(model)
    knowledge = Knowledge(architecture, model.state_dict() if base else None, OWN, trusted)
    finding = attack().run(opened.views[0], knowledge, opened.truth())
    return finding, {figure.name: figure.value for figure in finding.figures}


def test_rows_in_plain_are_pictures():
    finding, figures = run(Reconstruction, mlp, scheme="insecure-plain")
    assert figures["pictures found again"] > 0.95
    assert figures["SSIM"] > 0.99
    assert [len(row) for row in finding.panels[0].rows.values()] == [8, 8, 8]


@pytest.mark.parametrize("base", [False, True])
def test_mixed_rows_are_no_pictures(base):
    attack = ReconstructionBase if base else Reconstruction
    finding, figures = run(attack, mlp, scheme="mix", base=base)
    assert finding.verdict == "resisted"
    assert figures["pictures found again"] < 0.25


def test_tokens_are_read_where_the_base_is_known_and_nothing_masked():
    fields = {"trusted": ("embed",), "scheme": "insecure-plain"}
    assert run(Reconstruction, Tokens, **fields)[0].verdict == "not applicable"
    _, figures = run(ReconstructionBase, Tokens, base=True, **fields)
    assert figures["pictures found again"] > 0.95


def test_tokens_are_not_read_from_mixed_rows():
    finding, figures = run(ReconstructionBase, Tokens, base=True, trusted=("embed",), scheme="mix")
    assert finding.verdict == "resisted"
    assert figures["pictures found again"] < 0.25


def test_shield_rows_do_no_harm():
    assert run(Reconstruction, mlp, scheme="mix", x=VICTIMS[:5])[0].verdict == "resisted"


def test_inputs_must_be_pictures():
    torch.manual_seed(2)
    model = nn.Linear(64, 64)
    with lab.open_lab(scheme="mix") as opened:
        opened.session.protect(model, base="secret")
        model(torch.randn(64, 64))
    knowledge = Knowledge(
        lambda: nn.Linear(64, 64), None, Samples(torch.randn(64, 64), torch.zeros(64, dtype=torch.int64))
    )
    assert Reconstruction().run(opened.views[0], knowledge, opened.truth()).verdict == "not applicable"
