"""Turns at the device: in order of arrival, of bounded size, and without a trace in the numbers."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tempo.wire.messages import Conv, Linear, Product
from tempo.worker.compute import TorchCompute
from tempo.worker.turns import ALONE, Turns


def test_turns_come_in_the_order_in_which_they_are_asked_for() -> None:
    turns = Turns(1)
    served: list[int] = []

    def take(number: int) -> None:
        with turns:
            served.append(number)

    threads = []
    with turns:
        for number in range(8):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(turns._waiting) <= number:
                threads[-1].join(0.001)
        assert not served
    for thread in threads:
        thread.join()
    assert served == list(range(8))
    with turns:
        pass  # and it is free again


def test_who_had_a_turn_stands_behind_those_that_wait() -> None:
    turns, served = Turns(1), []

    def flood(name: str) -> None:
        for _ in range(50):
            with turns:
                served.append(name)
                while len(turns._waiting) < 2 and len(served) < 140:
                    pass  # until both others ask

    threads = [threading.Thread(target=flood, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rounds = [set(served[i : i + 3]) for i in range(0, 138, 3)]
    assert all(len(one) == 3 for one in rounds), served


def test_a_failure_ends_its_turn() -> None:
    turns = Turns(1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), turns:
            raise ZeroDivisionError


@given(
    st.integers(0, 10_000), st.integers(0, 1 << 40), st.integers(1, 500), st.integers(1, 1 << 30), st.booleans()
)  # fmt: skip
def test_parts_cover_everything_once_and_none_is_larger_than_it_may_be(
    count: int, flops: int, least: int, quantum: int, shared: bool
) -> None:
    turns = Turns(quantum)
    if shared:
        turns._waiting.append(threading.Lock())
    rows = []
    for part in turns.parts(count, flops, least):
        size = part.stop - part.start
        allowed = quantum * (1 if shared else ALONE)
        assert 0 < size <= least or size * flops <= allowed * count
        assert size >= least or part.stop == count
        rows += range(part.start, part.stop)
    assert rows == list(range(count))


def test_another_session_makes_parts_smaller() -> None:
    turns = Turns(1000)
    largest = [max(part.stop - part.start for part in turns.parts(10_000, 10_000, 1))]
    for _ in range(2):
        thread = threading.Thread(target=lambda: turns.__enter__().__exit__())
        thread.start()
        thread.join()
        with turns:
            pass
    largest.append(max(part.stop - part.start for part in turns.parts(10_000, 10_000, 1)))
    assert largest == [ALONE * 1000, 1000] or largest == [10_000, 1000]


@pytest.mark.parametrize(
    ("product", "x", "w"),
    [
        (Linear(), (300, 20), (270, 20)),
        (Conv((2,), (1,), (1,), 1), (20, 4, 9), (10, 4, 3)),
        (Conv((1, 1), (1, 1), (1, 1), 2), (20, 4, 5, 6), (18, 2, 3, 3)),
    ],
    ids=["linear", "conv1d", "groups"],
)
def test_products_in_parts_are_the_whole_products(product: Product, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    found: list[list[Tensor]] = []
    calls = []
    for quantum in 1, 1 << 60:
        torch.manual_seed(0)
        compute = TorchCompute(torch.device("cpu"))
        turns = compute._turns = Turns(quantum)
        enter, count = turns.parts, [0]

        def parts(*arguments: int) -> object:
            for part in enter(*arguments):  # noqa: B023
                count[0] += 1  # noqa: B023
                yield part

        turns.parts = parts
        a, b = torch.randn(x, dtype=torch.float64), torch.randn(w, dtype=torch.float64)
        shape = (x[0], w[0], *([] if isinstance(product, Linear) else [*_spatial(product, x, w)]))
        g, y, dx, dw = torch.randn(shape, dtype=a.dtype), a.new_empty(shape), torch.empty_like(a), torch.empty_like(b)
        compute.forward(product, a, b, y)
        compute.input_gradient(product, g, b, dx)
        compute.weight_gradient(product, g, a, dw)
        gradient = torch.ones_like(b)
        compute.accumulate(product, g, a, gradient)
        found.append([y, dx, dw, gradient])
        calls.append(count[0])
    assert calls[0] > calls[1]
    for divided, whole in zip(*found):
        torch.testing.assert_close(divided, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0][2] + 1, found[0][3], rtol=1e-12, atol=1e-12)


def _spatial(product: Conv, x: tuple[int, ...], w: tuple[int, ...]) -> list[int]:
    return [
        (size + 2 * padding - kernel) // stride + 1
        for size, kernel, stride, padding in zip(x[2:], w[2:], product.stride, product.padding)
    ]
