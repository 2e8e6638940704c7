"""What commands print: tables for people, one JSON document with --json, errors with a hint."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.errors import TorporError


def print_json(value: Any, *, to: TextIO | None = None) -> None:  # noqa: ANN401
    """One JSON document on standard output, or on another stream."""
    (to or sys.stdout).write(json.dumps(value, indent=2) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    empty: str,
    to: TextIO | None = None,
) -> None:
    """A table on standard output or another stream; `empty` on standard error without rows."""
    from rich.console import Console  # loaded where a table is drawn, not by each command
    from rich.table import Table

    if not rows:
        Console(stderr=True).print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    stream = to or sys.stdout
    width = None if stream.isatty() else 200
    Console(file=stream, width=width, highlight=False, markup=False).print(table)


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
