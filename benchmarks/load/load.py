"""An honest session of a worker, alone and beside others: sixteen of its kind, and hostile clients of every kind.

Seconds per step of a client that multiplies as fast as one worker on one thread lets it, as ratios to the same client
alone in the same minute. Whoever disturbs it does so from the same machine, where it takes CPU time as well: so each
also disturbs *another* worker (``elsewhere``), which shows the machine's share; ``nobody`` shows the noise.

    OMP_NUM_THREADS=1 python benchmarks/load/load.py [FILE.json]
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from tempo.bench.measure import machine
from tempo.engine.link import ACKNOWLEDGED, Link
from tempo.settings import Settings
from tempo.wire.address import Address
from tempo.wire.messages import Backward, Forward, Linear, Store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "integration"))
from hostile import CLIENTS, Where

ROWS, WIDTH, LAYERS = 256, 512, 4
STEPS = 8
ROUNDS = 5
SESSIONS = 16
LIMIT = "2GiB"
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["hostile"])  # importing torch in each client would be a disturbance of its own


@contextmanager
def worker() -> Iterator[Where]:
    """A worker on one thread; where it listens."""
    command = [sys.executable, "-m", "tempo.worker", "--listen", "127.0.0.1:0", "--insecure-no-tls"]
    command += ["--threads", "1", "--memory-limit", LIMIT]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        line = next(line for line in process.stderr if "listening on " in line)
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        try:
            host, port = line.split("listening on ")[1].split()[0].split(":")
            yield host, int(port)
        finally:
            process.terminate()
            drain.join()


class Honest:
    """Forward and backward products of a few layers, each of which waits for the one before."""

    def __init__(self, where: Where) -> None:
        address = Address(host=where[0], port=where[1], operator="operator")
        self.link = Link.connect(address, settings=Settings(insecure_no_tls=True), session="0123456789abcdef")
        self._x = torch.randn(ROWS, WIDTH)
        self._wants = {"y": ((ROWS, WIDTH), torch.float32)}
        for layer in range(LAYERS):
            w = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
            self.link.request(Store(step=0, layer=layer, weight=layer), {"w": w}, {})[ACKNOWLEDGED].result()

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        for layer in range(LAYERS):
            forward = Forward(step=0, layer=layer, weight=layer, operand=layer + 1, product=Linear())
            self.link.buffers.release(self.link.request(forward, {"x": self._x}, self._wants)["y"].result())
        for layer in reversed(range(LAYERS)):
            backward = Backward(step=0, layer=layer, weight=layer, operand=layer + 1, product=Linear())
            wants = {"dx": ((ROWS, WIDTH), torch.float32), "dw": ((WIDTH, WIDTH), torch.float32)}
            for future in self.link.request(backward, {"g": self._x}, wants).values():
                self.link.buffers.release(future.result())
        return time.perf_counter() - started

    def steps(self) -> float:
        """The median of some."""
        return median(self.step() for _ in range(STEPS))


@contextmanager
def beside(name: str, where: Where) -> Iterator[None]:
    """A hostile client in a process of its own."""
    process = FORK.Process(target=disturb, args=(name, where), daemon=True)
    process.start()
    time.sleep(0.4)  # until it is well under way
    try:
        yield
    finally:
        process.kill()
        process.join()
        time.sleep(0.1)


def disturb(name: str, where: Where) -> None:
    """The whole life of a hostile client: again whenever it is hung up on."""
    forever = threading.Event()
    while True:
        try:
            CLIENTS[name](where, forever)
        except OSError:
            time.sleep(0.05)


def hostile(name: str, honest: Honest, where: Where) -> dict[str, float]:
    """Medians over the rounds; the ratio's is that of neighbours in time."""
    alone, disturbed = [], []
    for _ in range(ROUNDS):
        alone.append(honest.steps())
        with beside(name, where):
            disturbed.append(honest.steps())
    ratios = [b / a for a, b in zip(alone, disturbed, strict=True)]
    return {"alone": median(alone), "beside": median(disturbed), "ratio": median(ratios)}


def many(where: Where) -> dict[str, float]:
    """Seconds per step of the fastest and the slowest of many at once, in units of one alone among them."""
    honest = [Honest(where) for _ in range(SESSIONS)]
    took: list[list[float]] = [[] for _ in honest]
    alone = honest[0].steps()
    deadline = time.monotonic() + 20 * SESSIONS * alone

    def work(number: int) -> None:
        while time.monotonic() < deadline:
            took[number].append(honest[number].step())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(SESSIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = honest[0].steps()
    for client in honest:
        client.link.close()
    medians = sorted(median(times) / median([alone, after]) for times in took)
    counts = sorted(len(times) for times in took)
    return {
        "fastest": medians[0],
        "slowest": medians[-1],
        "fewest_steps": counts[0],
        "most_steps": counts[-1],
        "longest_step": max(max(times) for times in took) / median([alone, after]),
    }


def main(target: Path | None) -> None:
    torch.set_num_threads(1)
    kept: dict[str, dict[str, float]] = {}
    with worker() as where, worker() as elsewhere:
        honest = Honest(where)
        print(f"alone: {honest.steps() * 1e3:.1f} ms per step")
        for name in CLIENTS:
            kept[name] = hostile(name, honest, where)
            kept[name]["elsewhere"] = hostile(name, honest, elsewhere)["ratio"]
            print(f"{name:16} {kept[name]['ratio']:5.2f}   elsewhere {kept[name]['elsewhere']:5.2f}", flush=True)
        honest.link.close()
        together = many(where)
        print(f"{SESSIONS} sessions: {', '.join(f'{name} {value:.1f}' for name, value in together.items())}")
    if target is not None:
        found = {"machine": machine(), "rounds": ROUNDS, "hostile": kept, "sessions": SESSIONS, "together": together}
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
