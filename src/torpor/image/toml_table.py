"""One table of a TOML file whose errors name file and line: typed values, checked as read."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torpor.errors import InvalidInput, TorporError
from torpor.image.toml_lines import find_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


class TomlTable:
    """A table and where it is in its file. Every method raises InvalidInput naming the line."""

    def __init__(
        self, path: Path, text: str, values: dict[str, Any], where: tuple[str | int, ...] = ()
    ) -> None:
        self.values = values
        self._path, self._text, self._where = path, text, where

    @classmethod
    def load(cls, path: Path) -> Self:
        """The file's root table. Raises FileNotFoundError, OSError too."""
        text = _decode(path, path.read_bytes())
        return cls(path, text, _parse(path, text))

    def inner(self, values: dict[str, Any], *where: str | int) -> Self:
        """A table inside this one, at the keys and indexes `where`."""
        return type(self)(self._path, self._text, values, (*self._where, *where))

    def words(self, key: str, default: tuple[str, ...] | None) -> tuple[str, ...]:
        """A list of strings, not empty; without `default` the key must be there."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, f"{key} is missing", missing=True)
            return default
        if not isinstance(value, list):
            raise self.error(key, f"{key} must be a list of strings")
        if not value:
            raise self.error(key, f"{key} must have at least one word")
        for index, word in enumerate(value):
            if not isinstance(word, str) or "\0" in word:
                raise self.error(key, f"{key} must be a list of strings without NUL", sub=index)
        return tuple(value)

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        """A table of strings, () without the key. No name has `=` or NUL in it."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"{key} must be a table of strings")
        for name, text in value.items():
            if not isinstance(text, str) or "\0" in name + text or not name or "=" in name:
                raise self.error(key, f"{key}.{name} must be a string", sub=name)
        return tuple(value.items())

    def number(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"{key} must be a whole number from {low} to {high}")
        return value

    def text(self, key: str, default: str) -> str:
        """A string without NUL."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or "\0" in value:
            raise self.error(key, f"{key} must be a string, not {type(value).__name__}")
        return value

    def absolute(self, key: str, text: str) -> str:
        """`text`, if it is an absolute path without `..`."""
        if not text.startswith("/") or ".." in text.split("/"):
            raise self.error(key, f"{key} must be an absolute path without '..'")
        return text

    def inside(self, key: str, directory: Path, text: str) -> Path:
        """The path `text` below `directory`, if neither it nor a link leads out of that."""
        given = PurePosixPath(text)
        try:
            real = (directory / text).resolve()
            real.exists()  # a name may be too long
        except (OSError, RuntimeError) as error:
            raise self.error(key, f"{text!r} cannot be looked up: {error}") from None
        outside = given.is_absolute() or ".." in given.parts
        if not text or outside or not real.is_relative_to(directory.resolve()):
            raise self.error(key, f"{text!r} is not inside {directory}")
        return directory / text

    def parsed(self, key: str, text: str, parse: Callable[[str], T]) -> T:
        """What `parse` makes of `text`; its error gets the line of `key`."""
        try:
            return parse(text)
        except TorporError as error:
            raise self.error(key, error.message, hint=error.hint) from None

    def table(self, key: str) -> Self | None:
        """The table of that key, None without it."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"{key} must be a table")
        return self.inner(value, key)

    def only(self, *known: str) -> None:
        """Refuse every key but the `known` ones."""
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise self.error(key, f"unknown key {key!r}", hint=hint)

    def error(
        self,
        key: str,
        message: str,
        *,
        hint: str = "",
        sub: str | int | None = None,
        missing: bool = False,
    ) -> InvalidInput:
        """An error with the line of `key`, or of what is inside it at `sub`.

        With `missing` the line is that of the table which should have the key.
        """
        where = (*self._where, key, *(() if sub is None else (sub,)))
        line = find_line(self._text, self._where if missing else where)
        return InvalidInput(f"{self._path}:{line}: {message}", hint=hint)


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidInput(f"{path}:{line}: not UTF-8", reason=str(error)) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    """The TOML text; the parser's errors tell their line at the end, ours at the beginning."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = found[2] if found and found[2] else text.rstrip("\n").count("\n") + 1
        raise InvalidInput(
            f"{path}:{line}: not TOML: {found[1] if found else error}",
            hint="see https://toml.io for how TOML is written",
        ) from None
