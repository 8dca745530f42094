"""Sessions whose workers run in threads of this process, honest or lying."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tempo.engine.link import Link
from tempo.session import Session
from tempo.settings import Settings, parse
from tempo.wire.address import Address
from tempo.worker.server import Options, Server


@contextmanager
def session_with(
    *lies: str, operators: tuple[str, ...] = (), transcripts: Path | None = None, **fields
) -> Iterator[Session]:
    """A session with one worker per entry: ``""`` is honest, anything else lies that way.

    They are of an operator each unless ``operators`` says otherwise; worker N records below ``transcripts / str(N)``.
    """
    fields = {"scheme": "tempo", "base": "secret", "placement": "all", "divide_flops": 1} | fields
    settings: Settings = parse(fields)
    with ExitStack() as stack:
        links = []
        for number, lie in enumerate(lies):
            folder = transcripts / str(number) if transcripts else None
            options = Options(insecure_no_tls=True, memory_limit="1GiB", insecure_lie=lie, transcript=folder)
            ours, theirs = socket.socketpair()
            thread = threading.Thread(target=Server(options).serve, args=(theirs, "test"))
            thread.start()
            stack.callback(thread.join)
            operator = operators[number] if operators else f"operator{number}"
            address = Address(host=f"worker{number}", operator=operator)
            links.append(Link.adopt(ours, address, settings=settings, session="0123456789abcdef"))
            stack.callback(links[-1].close)
        yield stack.enter_context(Session(links, settings, "0123456789abcdef"))
