"""Products on a device with memory of its own: the code that a GPU's worker runs, with other memory of this process."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from tempo.engine.link import ACKNOWLEDGED
from tempo.errors import WorkerFailedError, WorkerOutOfMemoryError
from tempo.wire.memory import mapping
from tempo.wire.messages import Backward, Conv, Forward, Linear, Sgd, Store, Update
from tempo.worker.compute import TorchCompute
from tempo.worker.device import Device, Mark

from .conftest import InProcess
from .test_products import operands, reference, through

Start = Callable[..., InProcess]


class Elsewhere(Device):
    """Memory that only `upload` and `download` reach. What is to be there before a mark is reached is not."""

    queues = True

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.there: list[Tensor] = []
        self.uploads = 0
        self.pinned = 0
        self.delivered_by: set[str] = set()
        self.fail: BaseException | None = None

    def allocate(self, size: int) -> mmap.mmap:
        self.pinned += size
        return mapping(size)

    def working(self) -> AbstractContextManager[object]:
        return nullcontext()

    def upload(self, tensor: Tensor) -> Tensor:
        if any(tensor is found for found in self.there):
            return tensor
        self.uploads += 1
        self.there.append(tensor.clone())
        return self.there[-1]

    def room(self, out: Tensor) -> Tensor:
        self.there.append(torch.full_like(out, 77))
        return self.there[-1]

    def mark(self) -> Mark:
        error, self.fail = self.fail, None

        def reached() -> None:
            if error is not None:
                raise error

        return reached

    def download(self, room: Tensor, out: Tensor) -> None:
        assert any(room is found for found in self.there)
        self.delivered_by.add(threading.current_thread().name)
        out.copy_(room)


@pytest.fixture
def elsewhere(start: Start) -> tuple[InProcess, Elsewhere]:
    """A worker with such a device."""
    worker, device = start(), Elsewhere()
    worker.server._compute = TorchCompute(device)
    worker.server._budget.allocate = device.allocate
    return worker, device


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("product", [Linear(), Conv((2, 1), (1, 2), (1, 2), 2)], ids=["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_elsewhere_are_products_here(elsewhere, transport, product, dtype):
    worker, device = elsewhere
    x, w, g = operands(product, dtype)
    found = through(worker.link(transport), product, x, w, g)
    tolerance = {"rtol": 2e-2, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for actual, expected in zip(found, reference(product, x.float(), w.float(), g.float()), strict=True):
        torch.testing.assert_close(actual.float(), expected, **tolerance)
    assert device.uploads == 3  # x, w and g, once each
    assert device.delivered_by == {"answers"}  # and not by the thread that computes
    assert (device.pinned > 0) == (transport == "tcp")  # shared memory is the other side's to allocate


def test_what_goes_wrong_on_the_device_is_the_failure_of_that_request(elsewhere):
    worker, device = elsewhere
    link = worker.link()
    x, w, g = operands(Linear(), torch.float32)
    link.request(Store(step=0, layer=1, weight=1), {"w": w}, {})[ACKNOWLEDGED].result()
    forward = Forward(step=0, layer=1, weight=1, operand=0, product=Linear())
    wants = {"y": (tuple(g.shape), g.dtype)}
    for error, expected in (
        (RuntimeError("an illegal memory access"), WorkerFailedError),
        (torch.OutOfMemoryError(), WorkerOutOfMemoryError),
    ):
        device.fail = error
        with pytest.raises(expected, match=r"illegal memory access|out of memory"):
            link.request(forward, {"x": x}, wants)["y"].result()
    torch.testing.assert_close(link.request(forward, {"x": x}, wants)["y"].result(), x @ w.t())


def test_weights_are_updated_where_they_are(elsewhere):
    worker, _ = elsewhere
    link = worker.link("tcp")
    x, w, g = operands(Linear(), torch.float32)
    link.request(Store(step=0, layer=1, weight=1), {"w": w}, {})[ACKNOWLEDGED].result()
    where = {"step": 0, "layer": 1, "weight": 1, "product": Linear(), "operand": 5}
    wants = {"y": (tuple(g.shape), g.dtype)}
    link.request(Forward(**where), {"x": x}, wants)["y"].result()
    link.request(Backward(**where, accumulate=True), {"g": g}, {})[ACKNOWLEDGED].result()
    rule = Sgd(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
    link.request(Update(step=0, layer=1, weight=1, rule=rule, scale=1.0), {}, {})[ACKNOWLEDGED].result()
    y = link.request(Forward(**where), {"x": x}, wants)["y"].result()
    torch.testing.assert_close(y, x @ (w - 0.5 * g.t() @ x).t(), rtol=1e-4, atol=1e-4)


def test_many_requests_are_answered_in_order_and_all_memory_comes_back(elsewhere):
    worker, _ = elsewhere
    link = worker.link()
    w = torch.eye(8)
    link.request(Store(step=0, layer=1, weight=1), {"w": w}, {})[ACKNOWLEDGED].result()
    forward = Forward(step=0, layer=1, weight=1, operand=0, product=Linear())
    order: list[int] = []
    futures = []
    for number in range(50):
        future = link.request(forward, {"x": torch.full((4, 8), float(number))}, {"y": ((4, 8), torch.float32)})["y"]
        future.add_done_callback(lambda _, number=number: order.append(number))
        futures.append(future)
    for number, future in enumerate(futures):
        assert bool((future.result() == number).all())
    assert order == list(range(50))
    link.close()
    for session in worker.sessions:
        session.join()
    assert worker.server._budget.used == 0
