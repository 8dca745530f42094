"""Bytes per second through one connection over loopback: plain TCP, TLS by Python's ``ssl``, and sealed chunks.

    python benchmarks/wire/throughput.py [FILE]

Two processes, one thread each. A message of 64 MiB goes there and back, the transports taking turns. A rate is
2 × bytes over the best round trip, which is what one direction carries while both ends work at once. On a shared
machine that says little, so beside it stands the processor time that each end spends per byte: its inverse is the rate
of a core of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import socket
import ssl
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import cryptography

from tempo.wire import identity, sealed
from tempo.wire.stream import CHUNK, SocketStream, Stream

SIZE = 64 << 20
ROUNDS = 15
CHUNKS = {"sealed": sealed.CHUNK, "sealed, chunks of 64 KiB": 64 << 10, "sealed, chunks of 1 MiB": 1 << 20}


class TLS:
    """What Tempo had before: an ``SSLSocket``, blocking, into a buffer that is there already."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls

    def write(self, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            for begin in range(0, len(buffer), CHUNK):
                self._tls.sendall(buffer[begin : begin + CHUNK])

    def read(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._tls.recv_into(view[done : done + CHUNK])


def wrap(name: str, sock: socket.socket, folder: Path, *, server: bool) -> Stream | TLS:
    """One end of a connection."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if name == "plain":
        return SocketStream(sock)
    mine, theirs = ("worker", "trusted") if server else ("trusted", "worker")
    context = identity.load(folder / f"{mine}.key", folder / f"{theirs}.pub", server=server)
    tls = (identity.accept if server else identity.connect)(sock, context, 20)
    if name == "tls":
        tls.settimeout(None)
        return TLS(tls)
    return sealed.leave_tls(tls, server=server)


def echo(name: str, port: int, folder: Path, report: Connection) -> None:
    """Send back what comes, then say how much processor time that took; until the other end hangs up."""
    sealed.CHUNK = CHUNKS.get(name, sealed.CHUNK)
    stream = wrap(name, socket.create_connection(("127.0.0.1", port)), folder, server=True)
    view = memoryview(bytearray(SIZE))
    while True:
        spent = time.process_time()
        try:
            stream.read(view)
        except (EOFError, OSError):
            return
        stream.write([view])
        report.send(time.process_time() - spent)


def main() -> None:
    names = ["plain", "tls", *CHUNKS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for who in "worker", "trusted":
            identity.generate(folder, who)
        ends, processes = {}, []
        for name in names:
            with socket.create_server(("127.0.0.1", 0)) as server:
                ours, theirs = multiprocessing.Pipe()
                process = multiprocessing.Process(
                    target=echo, args=(name, server.getsockname()[1], folder, theirs), daemon=True
                )
                process.start()
                processes.append(process)
                sealed.CHUNK = CHUNKS.get(name, sealed.CHUNK)
                ends[name] = wrap(name, server.accept()[0], folder, server=False), ours
        sent, came = memoryview(bytearray(os.urandom(1 << 20)) * (SIZE >> 20)), memoryview(bytearray(SIZE))
        seconds: dict[str, list[float]] = {name: [] for name in names}
        here: dict[str, list[float]] = {name: [] for name in names}
        there: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name, (stream, report) in ends.items():
                sealed.CHUNK = CHUNKS.get(name, sealed.CHUNK)
                started, spent = time.perf_counter(), time.process_time()
                stream.write([sent])
                stream.read(came)
                seconds[name].append(time.perf_counter() - started)
                here[name].append(time.process_time() - spent)
                there[name].append(report.recv())
            if came != sent:
                raise SystemExit("what came back is not what was sent")
        results = {
            name: {
                "GB_per_s": {
                    "best": round(2 * SIZE / min(seconds[name]) / 1e9, 2),
                    "median": round(2 * SIZE / statistics.median(seconds[name]) / 1e9, 2),
                },
                "cpu_ns_per_byte": {
                    "trusted": round(statistics.median(here[name]) / (2 * SIZE) * 1e9, 3),
                    "worker": round(statistics.median(there[name]) / (2 * SIZE) * 1e9, 3),
                },
                "GB_per_s_of_one_core_per_end": round(2 * SIZE / statistics.median(here[name]) / 1e9, 2),
                "GB_per_s_of_one_core_per_end_best": round(2 * SIZE / min(here[name]) / 1e9, 2),
            }
            for name in names
        }
        for process in processes:
            process.kill()
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    report = {
        "command": "python benchmarks/wire/throughput.py",
        "machine": {"cpu": cpu.partition(":")[2].strip(), "cores": os.cpu_count(), "load_1min": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(),
            "openssl": ssl.OPENSSL_VERSION,
            "cryptography": cryptography.__version__,
        },
        "bytes": SIZE,
        "rounds": ROUNDS,
        "results": results,
    }
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
