"""``python -m tempo.worker``, and the command ``tempo worker``."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated

import torch
import typer

from tempo.errors import TempoError
from tempo.worker.base import BITS
from tempo.worker.server import Options, Server

log = logging.getLogger("tempo.worker")


def worker(
    listen: Annotated[str, typer.Option(metavar="HOST:PORT|unix:PATH", help="Where to listen.")] = "127.0.0.1:7070",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; start one worker for each GPU.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for all cores.")] = 0,
    memory_limit: Annotated[str, typer.Option(help="Most memory for all sessions, such as 8GiB.")] = "",
    session_limit: Annotated[
        str, typer.Option(help="Most memory for one of them; no limit of its own by default.")
    ] = "",
    transcript: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Record every tensor received or returned.")
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Public checkpoint whose weights need not be sent here; repeatable."),
    ] = None,
    base_bits: Annotated[
        list[int] | None,
        typer.Option(min=2, max=16, help="Of its weights as integers (split_weight_bits); by default 9 and 8."),
    ] = None,
    identity: Annotated[Path | None, typer.Option(help="Private key made by `tempo keygen`.")] = None,
    peers: Annotated[Path | None, typer.Option(help="Certificate, or folder of them, of who may connect.")] = None,
    insecure_no_tls: Annotated[bool, typer.Option("--insecure-no-tls", help="Anyone may connect, in clear.")] = False,
    null: Annotated[bool, typer.Option("--null", help="Compute nothing; for benchmarks of the trusted side.")] = False,
    insecure_lie: Annotated[
        str,
        typer.Option(metavar="NAME[:N]", hidden=True, help="Lie with every N-th answer or update, to see it caught."),
    ] = "",
    inherit_fd: Annotated[int, typer.Option(hidden=True)] = -1,
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Compute masked products for trusted processes. Sees shapes and masked numbers, and nothing else."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if inherit_fd < 0 else logging.ERROR,
        format="%(asctime)s %(name)s: %(message)s",
    )
    if threads:
        torch.set_num_threads(threads)
    try:
        options = Options(
            device,
            memory_limit,
            session_limit,
            transcript,
            identity,
            peers,
            insecure_no_tls,
            null,
            insecure_lie,
            tuple(base or ()),
            tuple(base_bits or BITS),
        )
        server = Server(options)
        if inherit_fd >= 0:
            log.setLevel(logging.WARNING)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trusted process, which then ends us
            threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
            server.serve(socket.socket(fileno=inherit_fd), "local")
            return
        where = server.listen(listen)
        log.info("listening on %s%s", where, " WITHOUT TLS" if insecure_no_tls else "")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            server.accept_forever()
        finally:
            server.close()
    except TempoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens and whoever else holds the connection."""
    try:
        watch = os.pidfd_open(parent)
        if os.getppid() == parent:
            select.select([watch], [], [])
    except ProcessLookupError:
        pass
    os._exit(0)


if __name__ == "__main__":
    typer.run(worker)
