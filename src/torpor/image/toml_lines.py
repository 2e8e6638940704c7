"""The lines on which the keys and values of a TOML text stand; tomllib parses, but forgets lines.

A scanner for text that tomllib has accepted (TOML 1.0): it need not refuse anything.
"""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Place = tuple[str | int, ...]
"""Keys, and the indexes of array elements, from the root."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""+|' r"'''.*?'''+|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'", re.DOTALL
)
_PLAIN = re.compile(r"[^\s,\[\]{}#=]+(?: [\d:.Z+-]+)?")  # a date may have a space in it
_KEY_PART = re.compile(rf"[A-Za-z0-9_-]+|{_STRING.pattern}", re.DOTALL)


def find_line(text: str, path: Sequence[str | int]) -> int:
    """The number (from 1) of the line that has the longest beginning of `path`; 1 if none does."""
    best_line, best_depth = 1, 0
    for offset, place in _Scanner(text).places():
        depth = len(place)
        if depth > best_depth and tuple(path[:depth]) == place:
            best_line, best_depth = text.count("\n", 0, offset) + 1, depth
    return best_line


class _Scanner:
    """Goes through the text once; `_at` is the offset it has come to."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def places(self) -> Iterator[tuple[int, Place]]:
        """Offset and place of every header, key and array element."""
        table: Place = ()
        counts: dict[Place, int] = {}
        while self._skip_blank() < len(self._text):
            offset = self._at
            brackets = self._take("[[") or self._take("[")
            if not brackets:
                yield from self._pair(table)
                continue
            table = self._resolved(self._key(), counts, is_array=brackets == 2)
            self._at += brackets
            yield offset, table

    def _resolved(self, names: Place, counts: dict[Place, int], *, is_array: bool) -> Place:
        """The place that a header names: in arrays of tables, in their last element."""
        place: Place = ()
        for position, name in enumerate(names):
            place = (*place, name)
            if is_array and position == len(names) - 1:
                counts[place] = counts.get(place, -1) + 1
            if place in counts:
                place = (*place, counts[place])
        return place

    def _pair(self, table: Place) -> Iterator[tuple[int, Place]]:
        offset = self._at
        place = (*table, *self._key())
        yield offset, place
        self._at += 1  # the equals sign
        yield from self._value(place)

    def _value(self, place: Place) -> Iterator[tuple[int, Place]]:
        self._skip_blank()
        if self._take("["):
            index = 0
            while self._skip_blank() < len(self._text) and not self._take("]"):
                yield self._at, (*place, index)
                yield from self._value((*place, index))
                self._take_comma()
                index += 1
        elif self._take("{"):
            while self._skip_blank() < len(self._text) and not self._take("}"):
                yield from self._pair(place)
                self._take_comma()
        else:
            found = _STRING.match(self._text, self._at) or _PLAIN.match(self._text, self._at)
            self._at = found.end() if found else len(self._text)

    def _key(self) -> tuple[str, ...]:
        parts: list[str] = []
        while True:
            self._skip_blank()
            found = _KEY_PART.match(self._text, self._at)
            if found is None:
                self._at = len(self._text)
                return tuple(parts)
            parts.append(_unquoted(found[0]))
            self._at = found.end()
            self._skip_blank()
            if not self._take("."):
                return tuple(parts)

    def _take_comma(self) -> None:
        self._skip_blank()
        self._take(",")

    def _skip_blank(self) -> int:
        found = _BLANK.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._at

    def _take(self, token: str) -> int:
        """The token's length if it is next, else 0."""
        if not self._text.startswith(token, self._at):
            return 0
        self._at += len(token)
        return len(token)


def _unquoted(part: str) -> str:
    return str(tomllib.loads(f"key = {part}")["key"]) if part[0] in "\"'" else part
