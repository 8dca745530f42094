"""Workers on this machine: one process each, at the other end of a socket pair."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final

import msgspec

from tempo.engine.link import Link, stop
from tempo.errors import WorkerError
from tempo.settings import Settings
from tempo.wire.address import Address

_START_TIMEOUT: Final = 120.0
"""Seconds for a worker process to start; importing torch takes long on a cold disk."""


def start_local_workers(settings: Settings, *, session: str, null: bool = False, operators: int = 1) -> list[Link]:
    """Start ``settings.local_workers`` workers on this machine; closing a link ends its worker.

    They end with this process in any case, killed or not.

    Args:
        settings: How many, on which device, with how many threads and where they record transcripts.
        session: 16 hexadecimal digits; names the session in transcripts.
        null: Start workers that compute nothing, for benchmarks.
        operators: How many operators the scheme needs: where that is more than one, each worker plays one, and there
            are at least so many.
    """
    count = max(settings.local_workers, operators)
    threads = settings.local_threads or max(1, len(os.sched_getaffinity(0)) // count)
    patient = msgspec.structs.replace(settings, connect_timeout=max(settings.connect_timeout, _START_TIMEOUT))
    started = [_spawn(settings, threads, null) for _ in range(count)]  # all at once: they take a while to start
    links: list[Link] = []
    try:
        for index, (process, sock) in enumerate(started):
            address = Address(host="local", port=index, operator="local" if operators == 1 else f"local{index}")
            try:
                link = Link.adopt(sock, address, settings=patient, session=session)
            except WorkerError as error:
                raise WorkerError(f"local worker {index} did not start (its message is above): {error}") from error
            link.index, link.process = index, process
            links.append(link)
    except BaseException:
        for link in links:
            link.close()
        for process, sock in started[len(links) :]:
            sock.close()
            stop(process)
        raise
    return links


def restart(lost: Link, settings: Settings, *, session: str) -> Link:
    """A new worker in place of a local one that ended."""
    threads = settings.local_threads or max(1, len(os.sched_getaffinity(0)) // settings.local_workers)
    single = msgspec.structs.replace(settings, local_workers=1, local_threads=threads)
    (link,) = start_local_workers(single, session=session)
    link.address = lost.address
    return link


def _spawn(settings: Settings, threads: int, null: bool) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "tempo.worker", "--inherit-fd", str(theirs.fileno())]
        command += ["--parent", str(os.getpid()), "--device", settings.local_device, "--threads", str(threads)]
        command += ["--transcript", settings.transcript] if settings.transcript else []
        command += ["--null"] if null else []
        # Idle threads that spin would take from this process the cores that both share.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
        )
    return process, ours
