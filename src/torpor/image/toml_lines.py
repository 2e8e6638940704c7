"""The line on which a key of a TOML text stands; tomllib parses, but forgets lines."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)


def find_line(text: str, path: Sequence[str | int]) -> int:
    """The number (from 1) of the line that has the longest beginning of `path`; 1 if none does.

    `path` is keys and, for arrays of tables, indexes. Keys inside inline tables and multi-line
    arrays are found at the line of the key that holds them.
    """
    best_line, best_depth = 1, 0
    for line, here in _keys(text):
        depth = _common(here, path)
        if depth > best_depth and depth == len(here):
            best_line, best_depth = line, depth
    return best_line


def _keys(text: str) -> list[tuple[int, tuple[str | int, ...]]]:
    """(line, full path) of every header and key."""
    found: list[tuple[int, tuple[str | int, ...]]] = []
    table: tuple[str | int, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    lines = text.splitlines()
    skip_until = 0
    for number, line in enumerate(lines, 1):
        if number <= skip_until:
            continue
        header = _HEADER.match(line)
        if header:
            names = _names(header[2])
            table = names
            if header[1] == "[[":
                counts[names] = counts.get(names, -1) + 1
                table = (*names, counts[names])
            found.append((number, table))
            continue
        key = _KEY.match(line)
        if key:
            found.append((number, (*table, *_names(key[1]))))
            skip_until = _end_of_value(lines, number)
    return found


def _end_of_value(lines: list[str], number: int) -> int:
    """The last line of the key-value pair that begins on line `number`."""
    for last in range(number, min(number + 200, len(lines)) + 1):
        try:
            tomllib.loads("\n".join(lines[number - 1 : last]))
        except tomllib.TOMLDecodeError:
            continue
        return last
    return number


def _names(dotted: str) -> tuple[str, ...]:
    parts = re.findall(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""", dotted)
    return tuple(part.strip("\"'") for part in parts)


def _common(here: tuple[str | int, ...], path: Sequence[str | int]) -> int:
    depth = 0
    for ours, theirs in zip(here, path, strict=False):
        if ours != theirs:
            break
        depth += 1
    return depth
