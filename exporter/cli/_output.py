"""The one place that prints: results on stdout (tables, or JSON), progress on stderr and only where someone looks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDE = 10_000
"""Columns where no terminal sets a limit: lines then stay whole for grep and for logs."""


@dataclass(frozen=True)
class Output:
    """How one command speaks. `as_json`: its result is data for a program."""

    as_json: bool = False

    def result(self, data: Any, *parts: RenderableType) -> None:
        """Print what the command found: `data` with --json, else `parts` (text, tables) one after the other."""
        if self.as_json:
            click.echo(json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False))
            return
        console = _console(sys.stdout)
        with console.capture() as printed:
            for part in parts:
                console.print(part, highlight=False, markup=False)
        click.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))

    def note(self, text: str) -> None:
        """Say what is going on; nobody needs it afterwards. Silent unless stderr is a terminal."""
        if sys.stderr.isatty():
            click.secho(text, err=True, dim=True)

    def warn(self, text: str) -> None:
        """Say what the user should know though the command goes on."""
        click.secho("Warning: ", fg="yellow", nl=False, err=True)
        click.echo(text, err=True)

    def lines(self, lines: Iterable[str]) -> None:
        """Lines on stderr for a program that reads it, such as a CI system."""
        for line in lines:
            click.echo(line, err=True)

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str], None]]:
        """A spinner with `title` while the block runs, then how long it took. Yields a function that shows a detail."""
        if not sys.stderr.isatty():
            yield lambda text: None
            return
        console = _console(sys.stderr)
        began = time.monotonic()
        from rich.markup import escape

        with console.status(escape(title)) as status:
            yield lambda text: status.update(f"{escape(title)} [dim]{escape(text)}[/dim]")
        console.print(f"[green]✓[/green] {escape(title)} [dim]{time.monotonic() - began:.1f} s[/dim]", highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, note: str = "") -> RenderableType:
    """A table for `Output.result`. Columns whose name starts with ">" are right-aligned; None shows as "–"."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
        caption=Text(note) if note else None, caption_justify="left",
    )  # fmt: skip
    for name in columns:
        made.add_column(
            Text(name.removeprefix(">")), justify="right" if name.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    return made


def plain(value: Any) -> Any:
    """Data as JSON knows it: dataclasses and mappings to objects, paths to text, numpy to numbers, NaN to null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value


def _console(file: TextIO) -> Console:
    from rich.console import Console

    return Console(file=file, width=None if file.isatty() else WIDE)
