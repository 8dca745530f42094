"""``tempo doctor``."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Final

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tempo import __version__, kernels, schemes
from tempo.engine.geometry import flops
from tempo.engine.link import Link
from tempo.engine.placement import Planner
from tempo.errors import TempoError
from tempo.settings import Settings, parse
from tempo.wire.address import Address
from tempo.wire.messages import Conv, Linear, Product

_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")

_LAYERS: dict[str, tuple[Product, tuple[int, ...], tuple[int, ...]]] = {
    "linear 768 → 3072, 4,096 rows": (Linear(), (4096, 768), (3072, 768)),
    "linear 4096 → 4096, 8,192 rows": (Linear(), (8192, 4096), (4096, 4096)),
    "conv 3×3, 256 channels, 32 × 16×16": (Conv((1, 1), (1, 1), (1, 1), 1), (32, 256, 16, 16), (256, 256, 3, 3)),
}


def doctor(
    addresses: Annotated[list[str], typer.Argument(metavar="ADDRESS...", help="Workers to examine.")],
    identity: Annotated[str, typer.Option(help="Private key file for TLS.")] = "",
    peers: Annotated[str, typer.Option(help="File or folder of trusted workers' certificates.")] = "",
    insecure_no_tls: Annotated[
        bool, typer.Option("--insecure-no-tls", help="Speak to remote workers in clear.")
    ] = False,
) -> None:
    """Check in seconds that workers can be reached and match, how fast they are, and what gain to expect."""
    settings = parse({"identity": identity, "peers": peers, "insecure_no_tls": insecure_no_tls}, "doctor")
    console = Console()
    console.print(_kernels_in_use())
    if small := _small_pages():
        console.print(small, soft_wrap=True, highlight=False, markup=False)
    table = Table("worker", "device", title=f"workers, as seen from here (Tempo {__version__})")
    for heading in ("memory\nGiB", "latency\nµs", "up\nGB/s", "down\nGB/s", "speed\nGFLOP/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    reached: list[Link] = []
    problems: list[str] = []
    for text in addresses:
        try:
            link = Link.connect(Address.parse(text), settings=settings, session=secrets.token_hex(8))
            reached.append(link)
            seen = link.measure()
        except TempoError as error:
            problems.append(f"{text}: {error}")
            continue
        if link.welcome.version != __version__:
            problems.append(f"{text}: runs Tempo {link.welcome.version}; install {__version__} there, or that one here")
        table.add_row(
            Text(text),
            Text(link.welcome.device),
            f"{link.welcome.memory_limit / 2**30:.1f}",
            f"{seen.latency_s * 1e6:,.0f}",
            f"{seen.upload_bytes_per_s / 1e9:.2f}",
            f"{seen.download_bytes_per_s / 1e9:.2f}",
            f"{seen.flops_per_s / 1e9:,.0f}",
        )
    if reached:
        console.print(table)
        console.print(_gain(reached, settings))
    if len({link.address.operator for link in reached}) > 1:
        for link in reached:
            if link.unbound:
                said = f"scheme split would refuse {link.address}: {link.unbound}"
                console.print(said, soft_wrap=True, highlight=False, markup=False)
    for problem in problems:
        console.print(f"[red]✗[/] {escape(problem)}", soft_wrap=True, highlight=False)
    for link in reached:
        link.close()
    if problems:
        raise typer.Exit(1)


def _kernels_in_use() -> str:
    """Which kernels compute here; without native ones all is as it should be, and slow."""
    if len(kernels.available()) == 1:
        return (
            "kernels here: PyTorch's only. Native ones were not built, for want of a C++17 compiler perhaps: "
            "pip install -v says why; masks, checks and activations take longer without"
        )
    return f"kernels here: {kernels.selected()} (of {', '.join(kernels.available())})"


def _small_pages() -> str:
    """What keeps memory from large pages, if anything does."""
    kinds = {"enabled": "tensors and buffers", "shmem_enabled": "shared memory with workers of this host"}
    found = []
    for name, what in kinds.items():
        setting = _PAGES / name
        if setting.is_file() and "[never]" in setting.read_text():
            advice = "madvise" if name == "enabled" else "advise"
            found.append(f"{what}: pages of 4 KiB, which may be slower; as root: echo {advice} > {setting}")
    return "\n".join(found)


def _gain(links: list[Link], settings: Settings) -> Table:
    """What a training step of some typical layers would take here and through the workers, by the planner's model."""
    planner, scheme, speed = Planner(settings, links), schemes.create(settings.scheme), 0.0
    title = f"one training step in float32: here, or through these workers under {scheme.name} (estimate)"
    table = Table("layer", title=title)
    for heading in ("here", "masks", "checks", "wire", "workers", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, (product, x, w) in _LAYERS.items():
        estimate = planner.estimate(scheme, product, x, w, torch.float32, want_dx=True, want_dw=True)
        speed = max(speed, 3 * flops(product, x, w) / estimate.saved)
        cells = (estimate.saved, estimate.mask, estimate.check, estimate.wire, estimate.worker)
        gain = estimate.saved / (estimate.cost + estimate.worker)
        table.add_row(name, *(f"{seconds * 1e3:,.0f} ms" for seconds in cells), f"{gain:.1f} ×")
    table.caption = f"here: {torch.get_num_threads()} threads at {speed / 1e9:,.0f} GFLOP/s"
    return table
