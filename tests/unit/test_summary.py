"""The report of a session: what is protected, what is not, why, and with which share of the FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Network(nn.Module):
    """Something of every kind that the report tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.mixer = nn.GRU(4, 6, batch_first=True)
        self.table = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.spare = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = self.depthwise(self.stem(x)).flatten(2).transpose(1, 2)
        tokens = self.mixer(pixels)[0] + self.table.weight[0]
        return self.norm(self.head(self.attention(tokens, tokens, tokens)[0]))


X = torch.linspace(-1, 1, 2 * 3 * 36).sin().view(2, 3, 6, 6)
STEM = 2 * 2 * 16 * 4 * 3 * 9
DEPTHWISE = 2 * 2 * 4 * 4 * 9
ATTENTION = 2 * 2 * 4 * 6 * 6 * 4
HEAD = 2 * 2 * 4 * 6 * 5


def test_every_layer_has_its_place_and_the_reason_for_it(connect):
    session = connect(trusted=("head",))
    model = session.protect(Network())
    model(X)
    lines = {line.name: line for line in session.summary().lines}
    assert {name: (line.offloaded, line.trusted) for name, line in lines.items()} == {
        "stem": (STEM, 0),
        "depthwise": (0, DEPTHWISE),
        "attention": (ATTENTION, 0),
        "head": (0, HEAD),
        "spare": (0, 0),
    }
    reasons = {name: line.reason for name, line in lines.items()}
    assert reasons["stem"] == "offloaded"
    assert "depthwise" in reasons["depthwise"]
    assert reasons["attention"] == "offloaded"
    assert reasons["head"] == "kept by trusted='head'"
    assert reasons["spare"] == "not called yet"
    total = STEM + ATTENTION + DEPTHWISE + HEAD
    assert session.summary().offloaded_share == pytest.approx((STEM + ATTENTION) / total)


def test_modules_of_no_supported_type_are_named_and_tables_are_not(connect):
    session = connect()
    session.protect(Network())
    assert session.summary().unsupported == ["mixer (GRU)"]
    assert "of no supported type, so trusted: mixer (GRU)" in str(session.summary())


def test_before_the_first_batch_only_what_is_settled_is_said(connect):
    session = connect(trusted=("head",))
    session.protect(Network())
    text = str(session.summary())
    assert session.summary().offloaded_share == 0
    assert "No batch has been run yet" in text
    (head,) = [line for line in text.splitlines() if " head " in line]
    assert "trusted" in head
    (stem,) = [line for line in text.splitlines() if " stem " in line]
    assert "?" in stem


def test_the_printed_report_names_scheme_workers_places_and_shares(connect):
    session = connect(2, scheme="insecure-plain")
    session._engine.crew.shares = [0.75, 0.25]
    model = session.protect(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 18)), trusted=["2"])
    model(torch.ones(4, 6))
    text = str(session.summary())
    assert "Sequential: scheme insecure-plain, base secret (base='secret' was given): nothing" in text
    assert "75% of the rows" in text
    assert "25% of the rows" in text
    assert "25.0% of these layers' forward FLOPs went to workers" in text
    assert "75.0%" in text
    assert "kept by trusted='2'" in text


def test_too_few_flops_are_the_reason_under_automatic_placement(connect):
    session = connect(placement="auto")
    model = session.protect(nn.Linear(4, 4), offload=["*"])
    model(torch.ones(2, 4))
    (line,) = session.summary().lines
    assert line.name == "Linear"
    assert line.trusted > 0
    assert line.reason.startswith("does not pay: ")
    assert line.reason.endswith(")")  # with the figures


def test_unprotecting_one_model_leaves_the_report_of_another(connect):
    session = connect()
    first, second = (session.protect(nn.Sequential(nn.Linear(4, 4), nn.Bilinear(2, 2, 2))) for _ in range(2))
    session.unprotect(first)
    assert len(session.summary().lines) == 1
    assert session.summary().unsupported == ["1 (Bilinear)"]
    session.unprotect(second)
    assert session.summary().lines == []
    assert session.summary().unsupported == []


def test_a_session_names_the_scheme_of_each_model_and_why(connect):
    session = connect(scheme="mix", base="auto")
    models = [session.protect(nn.Linear(4, 4), base=base) for base in ("secret", None)]
    lines = [str(model) for model in session.summary().models]
    assert lines[0].startswith("Linear: scheme mix, base secret (base='secret' was given): resists")
    assert lines[1].startswith("Linear: scheme mix-tuned, base public (nothing is known of where its weights come from")
    assert all(line.split(" (")[0] in str(session.summary()) for line in lines)
    session.unprotect(models[0])
    assert [str(model) for model in session.summary().models] == lines[1:]
