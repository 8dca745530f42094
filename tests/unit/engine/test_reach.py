"""What cannot be sent is computed here, correctly: other kinds of tensors, and transforms that see through layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap


def sparse(model: nn.Module) -> Tensor:
    return model(torch.eye(4).to_sparse_csr())


def nested(model: nn.Module) -> Tensor:
    return model(torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged)).values()


def gradients_per_sample(model: nn.Module) -> Tensor:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return functional_call(model, {"weight": weight}, (x,)).square().sum()

    return vmap(grad(loss), (None, 0))(model.weight.detach(), torch.eye(4))


def forward_mode(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(torch.eye(4), torch.ones(4, 4)))).tangent


def traced(model: nn.Module) -> Tensor:
    return torch.jit.trace(model, torch.ones(2, 4), check_trace=False)(torch.eye(4))


def exported(model: nn.Module) -> Tensor:
    return torch.export.export(nn.Sequential(model), (torch.ones(4, 4),), strict=False).module()(torch.eye(4))


def exported_for_any_batch(model: nn.Module) -> Tensor:
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes=shapes, strict=False).module()(torch.eye(4))


def double(model: nn.Module) -> Tensor:
    return model.double()(torch.eye(4, dtype=torch.float32).double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:Sparse CSR")
@pytest.mark.parametrize(
    "use", [sparse, nested, gradients_per_sample, forward_mode, traced, exported, exported_for_any_batch]
)
def test_what_cannot_be_sent_is_computed_here(connect, use: Callable[[nn.Module], Tensor]):
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    torch.testing.assert_close(use(model), use(plain))
    assert session.stats().encryptions == {"x": 0, "w": 0, "g": 0}
    model(torch.eye(4))  # and afterwards, products go out as before
    assert session.stats().encryptions["x"] == 1


def test_shapes_can_be_worked_out_without_values(connect):
    session = connect()
    model = session.protect(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.empty(7, 4)).shape == (7, 2)
    assert session.stats().encryptions["x"] == 0


def test_a_float64_model_goes_out(connect):
    torch.manual_seed(0)
    plain = nn.Linear(4, 3)
    session = connect()
    model = session.protect(copy.deepcopy(plain))
    torch.testing.assert_close(double(model), double(plain))
    assert session.stats().encryptions["x"] == 1
