"""Probes of a worker that others use, too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tempo.engine import measure
from tempo.errors import WorkerOutOfMemoryError


@pytest.fixture
def probed(monkeypatch):
    """Probes of a link that take no time and are refused from so many bytes on, as the worker's memory has them."""

    def of(refused_from: int) -> measure.Measurement:
        def probe(link, size=0, upload=0, download=0):
            if max(upload, download, 12 * size**2) >= refused_from:
                raise WorkerOutOfMemoryError("out of memory")
            return 0.001

        monkeypatch.setattr(measure, "_probe", probe)
        return measure.measure(SimpleNamespace(welcome=SimpleNamespace(memory_limit=1 << 30)))

    return of


def test_probes_grow_until_others_leave_no_room(probed):
    found = probed(1 << 21)
    assert found.upload_bytes_per_s == found.download_bytes_per_s == pytest.approx((1 << 20) / 1e-6)
    assert found.flops_per_s == pytest.approx(2 * 256**3 / 1e-6)


def test_a_worker_without_room_for_any_probe_is_an_error(probed):
    with pytest.raises(WorkerOutOfMemoryError):
        probed(1 << 10)
