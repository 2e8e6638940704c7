"""What commands print: tables for people, one JSON document with --json, errors with a hint."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.errors import TorporError


def print_json(value: Any) -> None:  # noqa: ANN401
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A table on standard output, or `empty` on standard error when there is no row."""
    if not rows:
        Console(stderr=True).print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False).print(table)


def print_error(error: TorporError, *, as_json: bool) -> None:
    """An error on standard error: what happened, why, what to do."""
    if as_json:
        sys.stderr.write(json.dumps(error.to_dict()) + "\n")
        return
    sys.stderr.write(f"error: {error.message}\n")
    for line in error.reason.splitlines():
        sys.stderr.write(f"  {line}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


class Progress:
    """Tells standard error how an operation gets on: a bar on a terminal, else a line a phase."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self._quiet:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A new phase began."""
        if self._bar is not None:
            self._bar.console.print(f"[dim]{text} …[/dim]")
        elif not self._quiet:
            sys.stderr.write(f"{text} ...\n")

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """So much of a transfer is done."""
        if self._bar is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what[-40:], total=total_bytes)
        self._bar.update(self._tasks[what], completed=done_bytes, total=total_bytes)
