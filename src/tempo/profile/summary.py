"""One page about a step: the same tables for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

from rich.console import Group
from rich.table import Table

from tempo.profile.accounts import Accounts, Layer

MOST_LAYERS: Final = 12
_MOST_PARTS: Final = 8

_WORDS: Final = {
    ("masks", "x"): "inputs (x)",
    ("masks", "w"): "weights (w)",
    ("masks", "g"): "output gradients (g)",
    ("masks", "y"): "outputs (y)",
    ("masks", "dx"): "input gradients (dx)",
    ("masks", "dw"): "weight gradients (dw)",
    ("trusted layers", "torch::autograd::AccumulateGrad"): "gradients added up",
}


@dataclass(frozen=True)
class Page:
    """Tables with their titles, and a sentence or two."""

    title: str
    tables: list[tuple[list[str], list[list[str]]]]
    notes: list[str]

    def terminal(self) -> Group:
        """For a terminal."""
        parts: list[Table | str] = [self.title]
        for columns, rows in self.tables:
            table = Table()
            for number, column in enumerate(columns):
                table.add_column(column, justify="right" if number else "left", overflow="fold")
            for row in rows:
                table.add_row(*row)
            parts.append(table)
        return Group(*parts, *self.notes)

    def markdown(self) -> str:
        """As a file."""
        lines = [f"# {self.title}", ""]
        for columns, rows in self.tables:
            ruler = ["---", *["---:"] * (len(columns) - 1)]
            lines += [f"| {' | '.join(cells)} |" for cells in (columns, ruler, *(map(_escaped, row) for row in rows))]
            lines.append("")
        return "\n".join([*lines, *(f"{note}\n" for note in self.notes)])


def page(accounts: Accounts, title: str, about: dict[str, str]) -> Page:
    """Tell of ``accounts``; ``about`` says where they come from."""
    tables = [(["where the time goes", "ms", "share"], list(_places(accounts)))]
    if accounts.workers:
        tables += [
            (["worker, as it says", "computing, ms", "of the step"], list(_workers(accounts))),
            (
                ["offloaded layer", "mask", "check", "wire", "wait", "worker computes", "MB out", "MB in"],
                list(_layers(accounts)),
            ),
        ]
    return Page(title, tables, [*_notes(accounts), ", ".join(f"{name} {value}" for name, value in about.items())])


def _places(accounts: Accounts) -> Iterator[list[str]]:
    def row(name: str, spent: int) -> list[str]:
        return [name, _ms(spent), f"{spent / accounts.duration:.1%}"]

    for name, spent in accounts.groups().items():
        yield row(name, spent)
        parts = accounts.parts(name)
        for what in list(parts)[:_MOST_PARTS] if len(parts) > 1 else ():
            yield row(f"- {_WORDS.get((name, what), what)}", parts[what])
        if len(parts) > _MOST_PARTS:
            yield row("- others", sum(list(parts.values())[_MOST_PARTS:]))
    yield row("the step", accounts.duration)


def _workers(accounts: Accounts) -> Iterator[list[str]]:
    for worker, computed in accounts.computed.items():
        yield [worker, _ms(computed), f"{computed / accounts.duration:.1%}"]


def _layers(accounts: Accounts) -> Iterator[list[str]]:
    listed = accounts.layers[:MOST_LAYERS]
    if rest := accounts.layers[MOST_LAYERS:]:
        other = Layer(f"{len(rest)} others")
        for field in fields(Layer)[1:]:
            setattr(other, field.name, sum(getattr(layer, field.name) for layer in rest))
        listed = [*listed, other]
    for it in listed:
        times = (it.mask, it.verify, it.wire, it.worker, it.computed)
        yield [_short(it.name), *map(_ms, times), f"{it.sent / 1e6:.1f}", f"{it.received / 1e6:.1f}"]


def _notes(accounts: Accounts) -> Iterator[str]:
    if not accounts.workers:
        return
    trusted = accounts.duration - accounts.waiting
    busiest = max(accounts.computed.values())
    yield (
        f"This side worked for {_ms(trusted)} ms, which is what the step would take with workers and a wire that take "
        f"no time, and waited for {_ms(accounts.waiting)} ms. The busiest worker computed for {_ms(busiest)} ms, as it "
        "says. "
        f"If nobody ever waited, the step would take as long as the longer of the two: {_ms(accounts.bound)} ms, "
        f"{accounts.duration / accounts.bound:.2f} times as fast."
    )
    if accounts.elsewhere:
        spent = ", ".join(f"{_ms(time)} ms {kind}" for kind, time in accounts.elsewhere.items())
        yield f"Beside that, other threads of the trusted process worked: {spent}."


def _short(name: str) -> str:
    """Of several layers that go together, what they share once."""
    names = name.split(" + ")
    paths = [one.split(".")[:-1] for one in names]
    shared = ".".join(paths[0]) if all(path == paths[0] for path in paths) else ""
    return f"{shared}.({' + '.join(one[len(shared) + 1 :] for one in names)})" if shared and len(names) > 1 else name


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:,.1f}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
