"""Real worker processes: what they import, and when they end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tempo.engine.link import ACKNOWLEDGED
from tempo.engine.local import start_local_workers
from tempo.errors import WorkerError, WorkerLostError
from tempo.settings import Settings
from tempo.wire.messages import Probe

SESSION = "0123456789abcdef"
ALLOWED = ("tempo.wire", "tempo.worker")
ALSO = {"tempo", "tempo.errors", "tempo.kernels", "tempo._kernels"}
"""Kernels are functions of numbers that they are given: no key, and nothing that draws one."""

SERVE_AND_REPORT = """
import atexit, json, runpy, sys, torch
from pathlib import Path

def report():
    Path({report!r}).write_text(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] == "tempo")))

atexit.register(report)
sys.argv = {argv!r}
{run}
"""
RUNS = {
    "module": ('runpy.run_module("tempo.worker", run_name="__main__")', ["tempo.worker"], set()),
    "command": (
        "import tempo.cli; tempo.cli.main()",
        ["tempo", "worker"],
        {"tempo.cli", "tempo.cli.worker"},
    ),
}


@pytest.mark.parametrize("how", RUNS)
def test_a_worker_loads_nothing_that_could_hold_a_secret(how: str, tmp_path: Path) -> None:
    """It serves a whole session first, so that lazy imports have happened too."""
    run, argv, also = RUNS[how]
    socket_path, report = tmp_path / "w.sock", tmp_path / "modules.json"
    argv = [*argv, "--listen", f"unix:{socket_path}", "--threads", "1", "--transcript", str(tmp_path / "t")]
    code = SERVE_AND_REPORT.format(report=str(report), argv=argv, run=run)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            break
    client = f"""
import torch
from tempo.engine.link import Link
from tempo.settings import Settings
from tempo.wire.address import Address
from tempo.wire.messages import Forward, Linear, Store
link = Link.connect(Address.parse("unix:{socket_path}"), settings=Settings(), session={SESSION!r})
link.request(Store(step=0, layer=0, weight=1), {{"w": torch.eye(4)}}, {{}})[""].result()
wants = {{"y": ((4, 4), torch.float32)}}
forward = Forward(step=0, layer=0, weight=1, operand=1, product=Linear())
link.request(forward, {{"x": torch.eye(4)}}, wants)["y"].result()
link.close()
"""
    subprocess.run([sys.executable, "-c", client], check=True, timeout=60)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    ours = set(json.loads(report.read_text()))
    assert "tempo.worker.executor" in ours
    assert "tempo.worker.transcript" in ours
    extra = {name for name in ours - also - ALSO if not name.startswith(ALLOWED)}
    assert not extra


def test_local_workers_end_with_their_links() -> None:
    links = start_local_workers(Settings(local_workers=2, local_threads=1), session=SESSION)
    for link in links:
        assert link.request(Probe(size=8), {}, {})[ACKNOWLEDGED].result(60) is None
    assert len({link.process.pid for link in links if link.process}) == 2
    for link in links:
        link.close()
        assert link.process is not None
        assert link.process.returncode == 0  # ended by itself, and reaped


def test_a_killed_worker_is_lost_and_not_waited_for() -> None:
    (link,) = start_local_workers(Settings(local_threads=1), session=SESSION)
    assert link.process is not None
    futures = [link.request(Probe(size=4096), {}, {})[ACKNOWLEDGED] for _ in range(20)]
    link.process.kill()
    for future in futures:
        assert isinstance(future.exception(60), WorkerLostError | None)
    assert isinstance(futures[-1].exception(60), WorkerLostError)
    link.close()
    assert link.process.returncode == -signal.SIGKILL


def test_a_local_worker_that_cannot_start_is_explained(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerError, match="local worker 0 did not start"):
        start_local_workers(Settings(local_device="abacus", local_threads=1), session=SESSION)
    assert "abacus" in capfd.readouterr().err


def test_local_workers_die_with_a_killed_trusted_process() -> None:
    """Even when a forked child, such as a DataLoader's, still holds the connection."""
    code = f"""
import os, signal
from tempo.engine.local import start_local_workers
from tempo.settings import Settings
(link,) = start_local_workers(Settings(local_threads=1), session={SESSION!r})
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.close(write)
    os.read(read, 1)  # until the test lets go
    os._exit(0)
print(link.process.pid, child, flush=True)
signal.pause()
"""
    trusted = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trusted.stdout is not None
    worker, child = map(int, trusted.stdout.readline().split())
    watches = [os.pidfd_open(worker)]
    forked = os.pidfd_open(child)
    os.kill(child, signal.SIGSTOP)  # it holds the socket and cannot let go
    trusted.kill()
    trusted.wait()
    try:
        ended, _, _ = select.select(watches, [], [], 60)
        assert ended == watches
    finally:
        signal.pidfd_send_signal(forked, signal.SIGKILL)
        trusted.stdout.close()
        for watch in [*watches, forked]:
            os.close(watch)
