"""Sessions whose operands travel in eight bits: near plain PyTorch, fewer bytes, as closely checked."""

from __future__ import annotations

import copy

import pytest
import torch
from test_lying_workers import session_with
from torch import nn
from torch.nn import functional as F

from tempo import schemes
from tempo.errors import ProtectionWarning, ProtocolError, WorkerLiedError
from tempo.session import Session
from tempo.settings import parse
from tempo.wire.blocks import snap_
from tempo.wire.frame import TO_WORKER, decode, encode
from tempo.wire.messages import Probe, TensorRef

SIGNED = "tempo-signed"
SMALL = {"insecure_small_blocks": True, "mix_block": 4, "mix_row_block": 4}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 5))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    F.cross_entropy(model(x), torch.arange(32) % 5).backward()
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("scheme", ["insecure-plain", "tempo-signed", "mix"])
def test_gradients_are_near_plain_pytorch_s(scheme: str) -> None:
    plain = network()
    with session_with("", scheme=scheme, wire_dtype="int8", **(SMALL if scheme == "mix" else {})) as session:
        model = session.protect(copy.deepcopy(plain))
        found, expected = gradients(model), gradients(plain)
        assert session.stats().flops_offloaded > 0
        assert session.incidents == []
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.2 * gradient.norm(), name
    assert not torch.equal(found["3.weight"], expected["3.weight"])


@pytest.mark.parametrize("verify", ["always", "off"])
def test_workers_multiply_what_was_rounded_once_and_answer_in_bfloat16(verify: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96, bias=False), torch.randn(50, 64)
    with session_with("", scheme="insecure-plain", wire_dtype="int8", verify=verify) as session:
        y = session.protect(copy.deepcopy(layer))(x).detach()
    w = snap_(layer.weight.detach().clone())
    expected = (snap_(x.clone()) @ w.t()).bfloat16().float()
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)


def bytes_of(session: Session) -> tuple[int, int]:
    before = session.stats()
    gradients(session.protect(network()))
    spent = session.stats() - before
    return spent.bytes_sent, spent.bytes_received


def test_a_quarter_of_the_bytes_there_and_half_of_them_back() -> None:
    with session_with("", scheme=SIGNED) as full, session_with("", scheme=SIGNED, wire_dtype="int8") as small:
        there, back = bytes_of(full)
        there_small, back_small = bytes_of(small)
    assert there_small / there == pytest.approx(8.25 / 32, rel=0.01)
    assert back_small == back / 2


def test_lies_are_caught_and_honest_workers_are_not_accused() -> None:
    with session_with("", "element:5", scheme=SIGNED, wire_dtype="int8") as session:
        for _ in range(3):
            gradients(session.protect(network()))
        (incident,) = session.incidents
    assert isinstance(incident.error, WorkerLiedError)
    assert incident.address.startswith("worker1")


def test_double_precision_is_not_packed() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).double(), torch.randn(9, 64, dtype=torch.float64)
    with session_with("", scheme=SIGNED, wire_dtype="int8") as session:
        torch.testing.assert_close(session.protect(copy.deepcopy(layer))(x), layer(x), rtol=1e-10, atol=1e-10)


def test_answers_cannot_be_asked_for_in_eight_bits() -> None:
    frame = encode(Probe(id=1, size=0, wants=(TensorRef("y", "mxint8", (4,)),)))
    with pytest.raises(ProtocolError, match="only operands"):
        decode(TO_WORKER, frame[16:], 0, None)


def test_scales_as_wide_as_eight_bits_are_warned_of() -> None:
    with pytest.warns(ProtectionWarning, match=r"'tempo'.*int8.*mix.*tempo-signed.*bfloat16"):
        schemes.create("tempo", parse({"scheme": "tempo", "wire_dtype": "int8"}))
