"""Workers killed, frozen, cut off and lying at random moments: every run ends with the undisturbed numbers.

``make chaos`` runs many and keeps the table; the test suite a few. Workers are forked from a server that has imported
torch already, since starting them is most of the time.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import small_job
import torch
from relay import WAYS, Relay, tcp_pair
from small_job import network
from torch import nn

from tempo.engine.link import Link
from tempo.errors import WorkerError, WorkerLiedError
from tempo.session import Session
from tempo.settings import parse
from tempo.wire.address import Address
from tempo.worker.lying import LIES, UPDATE_LIES
from tempo.worker.server import Options, Server

RUNS = int(os.environ.get("TEMPO_CHAOS_RUNS", "6"))
TABLE = os.environ.get("TEMPO_CHAOS_TABLE", "")
FAULTS = ("kill", "freeze", "hang up", "cut", "lie")
NAME = "0123456789abcdef"
STALL = 3.0


def serve(sock: socket.socket, lie: str) -> None:
    """A worker's whole life, in a process of its own."""
    torch.set_num_threads(1)
    Server(Options(insecure_no_tls=True, memory_limit="1GiB", insecure_lie=lie)).serve(sock, "chaos")


@pytest.fixture(scope="module")
def fork() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tempo.session", "tempo.worker.server"])
    return context


def losses(model: nn.Module, steps: int = 4, session: Session | None = None) -> list[float]:
    return small_job.losses(model, steps, session)


def strike(
    link: Link, process: BaseProcess, relay: Relay | None, fault: str, at: int, way: str, *, after: bool
) -> None:
    """Let ``fault`` befall the worker just before or after its request of that number is sent.

    Args:
        link: To the worker.
        process: The worker's.
        relay: Between the two.
        fault: One of `FAULTS`, but for lies.
        at: Number of the request.
        way: That is cut.
        after: Whether the request is sent before.
    """
    count, request = [0], link.request

    def disturbed(*arguments):
        count[0] += 1
        futures = request(*arguments) if after else None
        if count[0] == at:
            if fault == "kill":
                process.kill()
            elif fault == "freeze":
                os.kill(process.pid, signal.SIGSTOP)
            elif fault == "cut":
                relay.cut(way)
            else:
                link._channel.stream.shutdown()
        return futures or request(*arguments)

    link.request = disturbed


def one_run(seed: int, fork: multiprocessing.context.ForkServerContext, expected: list[float]) -> dict[str, object]:
    """One training run in which all but sometimes one worker come to grief."""
    chance = random.Random(seed)
    count = chance.randint(2, 4)
    befallen = chance.sample(range(count), chance.randint(1, count))
    faults = {number: chance.choice(FAULTS) for number in befallen}
    update = chance.choice(["trusted", "worker"])
    lies = [*LIES, *(UPDATE_LIES if update == "worker" else ())]
    settings = parse(
        {
            "scheme": chance.choice(["tempo-signed" if update == "worker" else "tempo", "mix"]),
            "update": update,
            "base": "secret",
            "placement": "all",
            "divide_flops": chance.choice([1, 1 << 20]),
            "stall_timeout": STALL,
            "patience": 0,
            "insecure_small_blocks": True,
            "mix_block": 4,
            "mix_row_block": 4,
        }
    )
    processes = []
    started = time.monotonic()
    with ExitStack() as stack:
        links, relays = [], []
        for number in range(count):
            lie = f"{chance.choice(lies)}:{chance.randint(1, 30)}" if faults.get(number) == "lie" else ""
            # Some over a relay, since shared memory's descriptors pass none.
            relayed = faults.get(number) == "cut" or chance.random() < 0.3
            ours, near = tcp_pair() if relayed else socket.socketpair()
            far, theirs = tcp_pair() if relayed else (near, near)
            process = fork.Process(target=serve, args=(theirs, lie))
            process.start()
            theirs.close()
            processes.append(process)
            relays.append(Relay(near, far) if relayed else None)
            if relayed:
                stack.callback(relays[-1].close)
            stack.callback(process.join)
            stack.callback(process.kill)
            address = Address(host=f"worker{number}", operator=f"operator{number}")
            link = Link.adopt(ours, address, settings=settings, session=NAME)
            stack.callback(link.close)
            links.append(link)
        session = stack.enter_context(Session(links, settings, NAME))
        model = session.protect(network())
        for number, fault in faults.items():
            if fault != "lie":
                moment, way = chance.randint(1, 40), chance.choice(WAYS)
                after = chance.random() < 0.5
                strike(links[number], processes[number], relays[number], fault, moment, way, after=after)
        try:
            found = losses(model, session=session)
            outcome = "same numbers"
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), (seed, faults)
        except WorkerError:
            outcome = "nobody left"
            if len(befallen) < count:  # somebody sound was there all the time
                raise
        accused = {i.address for i in session.incidents if isinstance(i.error, WorkerLiedError)}
        liars = {f"worker{number}:0@operator{number}" for number, fault in faults.items() if fault == "lie"}
        assert accused <= liars, (seed, accused, liars)
        met = len(session.incidents)
        session.close()
    assert all(not process.is_alive() for process in processes)
    for process in processes:
        process.close()
    return {
        "seed": seed,
        "workers": count,
        "scheme": settings.scheme,
        "update": update,
        "faults": sorted(faults.values()),
        "left the session": met,
        "outcome": outcome,
        "seconds": round(time.monotonic() - started, 1),
    }


def descriptors() -> int:
    """Open in this process; segments of shared memory have one each, as long as anything maps them."""
    torch.ones(1, requires_grad=True).sum().backward()  # autograd keeps what it last failed with until then
    for _ in range(4):  # a generation at a time: graphs of autograd are freed as a consequence only
        gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_chaos(fork):
    expected = losses(network())
    one_run(0, fork, expected)  # starts the fork server, whose descriptors stay
    before = descriptors()
    runs = [one_run(seed, fork, expected) for seed in range(1, RUNS + 1)]
    assert descriptors() == before  # sockets, shared memory, watched processes: nothing is left
    assert any(run["left the session"] for run in runs)
    if TABLE:
        outcomes = Counter(run["outcome"] for run in runs)
        befell = Counter(fault for run in runs for fault in run["faults"])
        table = {"runs": len(runs), "outcomes": outcomes, "faults": befell, "each": runs}
        Path(TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
