"""Memory in large pages: asked for, harmless, and values stay."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tempo.engine.memory import keep_heap, onto_large_pages
from tempo.wire.memory import LARGE_PAGE, PrivatePool
from tempo.wire.shared import Segments, SharedPool

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="this kernel has no large pages",
)


def asked_for(tensor: Tensor) -> bool:
    """Whether the kernel was asked to give large pages to the middle of ``tensor``."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("the tensor lies nowhere")


def test_the_heap_is_asked_for_in_large_pages_once() -> None:
    """By whoever opens a session; the heap does not grow a second time."""
    assert keep_heap()
    before = Path("/proc/self/statm").read_text().split()[0]
    assert keep_heap()
    assert Path("/proc/self/statm").read_text().split()[0] == before
    assert asked_for(torch.empty(4 * LARGE_PAGE, dtype=torch.uint8))


FAULTS = """
import resource, torch
from tempo.engine.memory import keep_heap, touch_heap
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept = []
def fill():
    before = faults()
    kept.append(torch.zeros(1 << 24))
    return faults() - before
torch.zeros(1)
keep_heap()
untouched = fill()
touch_heap()
print(untouched, fill())
"""


def test_a_touched_heap_meets_no_new_pages() -> None:
    """Benchmarks would time the kernel bringing them in; an untouched one does meet them."""
    untouched, touched = subprocess.check_output([sys.executable, "-c", FAULTS], text=True).split()
    assert int(untouched) >= 16
    assert int(touched) < int(untouched) // 4


def test_a_parameter_moves_to_large_pages_where_it_is() -> None:
    """Address and values are what they were."""
    memory = mmap.mmap(
        -1, 4 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # as the allocator maps what is made before a session
    values = torch.frombuffer(memory, dtype=torch.float32).normal_()
    before, address = values.clone(), values.data_ptr()
    assert not asked_for(values)
    onto_large_pages(values)
    assert asked_for(values)
    assert values.data_ptr() == address
    assert torch.equal(values, before)


def test_buffers_of_links_are_asked_for_in_large_pages() -> None:
    """Of sockets and of shared memory."""
    segments = Segments()
    try:
        for pool in (PrivatePool(), SharedPool(segments, answers=False), SharedPool(segments, answers=True)):
            block = pool.take(8 * LARGE_PAGE)
            assert asked_for(block.tensor((8 * LARGE_PAGE,), torch.uint8)), type(pool)
    finally:
        segments.close()
