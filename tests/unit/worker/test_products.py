"""Products through a link are torch's products, over every transport."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.errors import WorkerFailedError
from tempo.wire.layout import meant, sent
from tempo.wire.messages import Backward, Conv, Forward, Linear, Probe, Product, Store

from .conftest import InProcess

Start = Callable[..., InProcess]
CONV2D = Conv((2, 1), (1, 2), (1, 2), 2)
LAST = Conv((2, 1), (1, 2), (1, 2), 2, channels_last=True)


def reference(product: Product, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    if isinstance(product, Linear):
        y = F.linear(x, w)
    else:
        convolve = [F.conv1d, F.conv2d, F.conv3d][len(product.stride) - 1]
        y = convolve(x, w, None, product.stride, product.padding, product.dilation, product.groups)
    y.backward(g)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


def through(link: Link, product: Product, x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, g = sent(product, "x", x), sent(product, "g", g)
    where = {"step": 0, "layer": 1, "weight": 1}
    link.request(Store(**where), {"w": w}, {})[ACKNOWLEDGED].result()
    message = Forward(**where, operand=5, product=product)
    filled = link.buffers.empty(tuple(x.shape), x.dtype).copy_(x)
    y = link.request(message, {"x": filled}, {"y": (tuple(g.shape), g.dtype)})["y"].result()
    backward = Backward(**where, operand=5, product=product)
    wants = {"dx": (tuple(x.shape), x.dtype), "dw": (tuple(w.shape), w.dtype)}
    futures = link.request(backward, {"g": g}, wants)
    dx = meant(product, "dx", futures["dx"].result())
    return meant(product, "y", y), dx, futures["dw"].result()


def operands(product: Product, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = {0: ((7, 5), (3, 5)), 1: ((3, 4, 9), (6, 2, 3)), 2: ((2, 4, 9, 11), (6, 2, 3, 3))}
    axes = 0 if isinstance(product, Linear) else len(product.stride)
    x, w = (torch.randn(shape).to(dtype) for shape in shapes[axes])
    y = F.linear(x, w) if axes == 0 else torch.convolution(
        x, w, None, product.stride, product.padding, product.dilation, False, [0] * axes, product.groups
    )  # fmt: skip
    return x, w, torch.randn(y.shape).to(dtype)


@pytest.mark.parametrize("transport", ["shm", "tcp", "tls"])
@pytest.mark.parametrize(
    "product", [Linear(), Conv((2,), (1,), (1,), 2), CONV2D, LAST], ids=["linear", "conv1d", "conv2d", "last"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_and_gradients(start: Start, transport: str, product: Product, dtype: torch.dtype) -> None:
    link = start(tls=transport == "tls").link(transport)
    x, w, g = operands(product, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    once = torch.promote_types(dtype, torch.float32)  # torch may round half precision more than once
    expected = reference(product, x.to(once), w.to(once), g.to(once))
    for ours, theirs in zip(through(link, product, x, w, g), (t.to(dtype) for t in expected)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_operands_need_not_be_contiguous_and_answers_may_have_another_dtype(start: Start) -> None:
    link = start().link()
    x = torch.randn(5, 7).t()
    w = torch.randn(10, 5)[::2]
    link.request(Store(step=0, layer=0, weight=1), {"w": w.requires_grad_()}, {})[ACKNOWLEDGED].result()
    message = Forward(step=0, layer=0, weight=1, operand=0, product=Linear())
    y = link.request(message, {"x": x}, {"y": ((7, 5), torch.float64)})["y"].result()
    torch.testing.assert_close(y, (x @ w.t()).double().detach(), rtol=1e-6, atol=1e-6)


def test_an_empty_batch_is_a_product_too(start: Start) -> None:
    for transport in "shm", "tcp":
        link = start().link(transport)
        for answer in through(link, Linear(), torch.empty(0, 5), torch.randn(3, 5), torch.empty(0, 3))[:2]:
            assert answer.numel() == 0


@pytest.mark.parametrize("transport", ["shm", "tcp", "tls"])
def test_many_requests_in_flight_are_answered_each_by_its_own(start: Start, transport: str) -> None:
    link = start(tls=transport == "tls").link(transport)
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.eye(64)}, {})
    message = Forward(step=0, layer=0, weight=1, operand=0, product=Linear())
    inputs = [torch.full((300, 64), float(i)) for i in range(64)]
    wants = {"y": ((300, 64), torch.float32)}
    futures = [link.request(message, {"x": x}, wants)["y"] for x in inputs]
    for x, future in zip(inputs, futures):
        y = future.result()
        assert torch.equal(x, y)
        link.buffers.release(y)


def test_large_requests_in_flight_do_not_block_one_another(start: Start) -> None:
    """Both directions are full at once: more than the sockets' buffers hold."""
    link = start().link("tcp")
    x = torch.randint(0, 100, (1 << 23,), dtype=torch.uint8)
    futures = [link.request(Probe(size=0), {"x": x}, {"y": ((1 << 23,), torch.uint8)})["y"] for _ in range(6)]
    assert all(future.result().numel() == 1 << 23 for future in futures)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_steady_state_takes_no_new_memory(start: Start, transport: str) -> None:
    link = start().link(transport)
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.eye(64)}, {})[ACKNOWLEDGED].result()

    def step() -> set[int]:
        x = link.buffers.empty((128, 64), torch.float32)
        message = Forward(step=0, layer=0, weight=1, operand=1, product=Linear())
        y = link.request(message, {"x": x}, {"y": ((128, 64), torch.float32)})["y"].result()
        link.buffers.release(y)
        return {x.data_ptr(), y.data_ptr()}

    first = step() | step()
    assert all(step() <= first for _ in range(10))


def test_forgotten_numbers_are_gone_at_the_next_request(start: Start) -> None:
    link = start().link()
    for number in range(1, 5000):
        link.forget(operands=[number])
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.eye(4)}, {})[ACKNOWLEDGED].result()
    link.forget(weights=[1])
    message = Forward(step=0, layer=9, weight=1, operand=0, product=Linear())
    with pytest.raises(WorkerFailedError, match=r"layer 9: unknown-number: weight 1 is not stored"):
        link.request(message, {"x": torch.ones(2, 4)}, {"y": ((2, 4), torch.float32)})["y"].result()


@pytest.mark.parametrize(
    ("x", "product", "wants"),
    [
        ((2, 5), Linear(), {"y": (2, 4)}),
        ((2, 4), Linear(), {"y": (2, 5)}),
        ((2, 4), Linear(), {"z": (2, 4)}),
        ((2, 4, 1), Linear(), {"y": (2, 4)}),
        ((2, 4), Conv((), (), (), 1), {"y": (2, 4)}),
        ((2, 4), Conv((1,), (0,), (1,), 1), {"y": (2, 4)}),
        ((2, 4), Conv((0, 0), (0, 0), (1, 1), 1), {"y": (2, 4)}),
    ],
)
def test_a_request_that_makes_no_sense_fails_alone(start: Start, x: tuple[int], product: Product, wants: dict) -> None:
    link = start().link()
    link.request(Store(step=0, layer=0, weight=1), {"w": torch.eye(4)}, {})[ACKNOWLEDGED].result()
    message = Forward(step=0, layer=3, weight=1, operand=1, product=product)
    futures = link.request(message, {"x": torch.ones(x)}, {k: (v, torch.float32) for k, v in wants.items()})
    for future in futures.values():
        with pytest.raises(WorkerFailedError, match="layer 3: bad-request"):
            future.result()
    good = Forward(step=0, layer=3, weight=1, operand=1, product=Linear())
    y = link.request(good, {"x": torch.ones(2, 4)}, {"y": ((2, 4), torch.float32)})["y"].result()
    assert torch.equal(y, torch.ones(2, 4))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_the_null_worker_answers_with_finite_numbers(start: Start, dtype: torch.dtype, transport: str) -> None:
    link = start(null=True).link(transport)
    for other in torch.float64, dtype, torch.float64, dtype:  # blocks change their dtype between steps
        x, w, g = operands(CONV2D, torch.float32)
        for answer in through(link, CONV2D, x.to(other), w.to(other), g.to(other)):
            assert answer.dtype == other
            assert answer.double().isfinite().all()
            link.buffers.release(answer)


@pytest.mark.parametrize("transport", ["shm", "tls"])
def test_measuring(start: Start, transport: str) -> None:
    measured = start(tls=transport == "tls").link(transport).measure()
    assert 0 < measured.latency_s < 1
    assert min(measured.upload_bytes_per_s, measured.download_bytes_per_s, measured.flops_per_s) > 0
