"""Real workers for all tests: three processes on Unix sockets, started once, shared by isolated sessions."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

# Before torch is loaded: on few cores, threads that spin while they wait keep the workers from working.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import tempo
from tempo.session import Session

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Addresses of three running workers."""
    folder = tmp_path_factory.mktemp("workers")
    addresses = [f"unix:{folder}/w{i}.sock" for i in range(3)]
    with ExitStack() as stack:
        processes = []
        for address in addresses:
            command = [sys.executable, "-m", "tempo.worker", "--listen", address, "--threads", "1"]
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            processes.append(process)
        for process in processes:
            assert any("listening" in line for line in process.stderr), "a test worker did not start"
            # Whatever it logs from now on must not fill the pipe.
            drain = threading.Thread(target=process.stderr.read, daemon=True)
            drain.start()
            stack.callback(drain.join)
            stack.callback(process.terminate)
        yield addresses


Connect = Callable[..., Session]


@pytest.fixture
def connect(workers: list[str]) -> Iterator[Connect]:
    """Open sessions with the shared workers, everything offloaded; closed after the test.

    Layers in tests are small, and `mix` keeps those here that are narrower than a block: so `tempo`, unless a test
    names another scheme, which is then the one it gets, not a preset for public weights.
    """
    with ExitStack() as stack:

        def open_session(count: int = 1, operators: int = 1, **fields: Any) -> Session:
            fields.setdefault("placement", "all")
            fields.setdefault("divide_flops", 1)
            fields.setdefault("scheme", "tempo")
            fields.setdefault("base", "secret")
            addresses = workers[:count]
            if operators > 1:
                addresses = [f"{address}@operator{i % operators}" for i, address in enumerate(addresses)]
            return stack.enter_context(tempo.connect(*addresses, **fields))

        yield open_session
