"""``tempo keygen``: key pairs for connections to other machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tempo.wire import identity


def keygen(
    name: Annotated[str, typer.Argument(help="What the files are called; `identity` is used by default.")] = "identity",
    folder: Annotated[Path | None, typer.Option("--dir", help="Where they go.", show_default="~/.config/tempo")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a key pair that is there, for good.")] = False,
) -> None:
    """Make a key pair: one on each machine, then each gets the other's .pub file."""
    key, pub, fingerprint = identity.generate(folder or identity.home(), name, force=force)
    typer.echo(f"private key  {key}  (stays here, readable by you only)")
    typer.echo(f"certificate  {pub}")
    typer.echo(f"fingerprint  {fingerprint}")
    typer.echo(f"\nCopy {pub.name} to the other machine, into ~/.config/tempo/peers, under a name of its own:")
    typer.echo(f"  scp {pub} HOST:.config/tempo/peers/$(hostname).pub")
    typer.echo(f"and put the other machine's .pub file into {key.parent / 'peers'} here.")
    typer.echo("Under scheme split, workers' files go into a folder there for each operator: peers/OPERATOR.")
