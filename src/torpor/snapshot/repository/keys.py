"""Domain keys: who shares one, shares chunks; everybody else learns nothing (docs/format.md).

A keyring is a text: `torpor-key-1:` and 64 hexadecimal digits a line, the current key first, then
the older ones, which only read. Empty lines and lines that begin with `#` are skipped.
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import Conflict, InvalidInput, NotFound
from torpor.snapshot.repository.domain import Domain, PlainDomain, SealedDomain

if TYPE_CHECKING:
    from pathlib import Path

_PREFIX: Final = "torpor-key-1:"
_DIGITS: Final = 64


@dataclass(frozen=True)
class Keyring:
    """The domains that a process may use: `current` writes and reads, `others` only read.

    What is stored plain is read only when PlainDomain is one of them: whoever can write to the
    store can make plain objects, so a ring of keys alone takes none for its own.
    """

    current: Domain
    others: tuple[Domain, ...] = ()

    def find(self, key_id: bytes) -> Domain | None:
        """The domain with this id, None if its key is not in the ring."""
        return next((d for d in (self.current, *self.others) if d.key_id == key_id), None)

    def with_plain(self) -> Keyring:
        """This ring, reading plain objects too."""
        return Keyring(self.current, (*self.others, PlainDomain()))


def plain_keyring() -> Keyring:
    """A keyring without keys: everything is written in the clear."""
    return Keyring(PlainDomain())


def new_key_line() -> str:
    """A fresh random key as a keyring's line."""
    return f"{_PREFIX}{secrets.token_hex(32)}"


@dataclass(frozen=True)
class KeyLine:
    """One key of a keyring's text: the line as it stands there, secret, and its domain."""

    line: str
    domain: SealedDomain


def parse_lines(text: str, *, source: str) -> list[KeyLine]:
    """The keys in a text, the current one first, each once.

    Raises InvalidInput naming source and line, never showing a key; also when there is none.
    """
    keys: list[KeyLine] = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        digits = word.removeprefix(_PREFIX)
        if digits == word or len(digits) != _DIGITS or not set(digits) <= set("0123456789abcdef"):
            raise InvalidInput(
                f"line {number} of {source} is not a key",
                hint=f"a key is {_PREFIX} and {_DIGITS} hexadecimal digits; `torpor key init`"
                " makes one",
            )
        domain = SealedDomain(bytes.fromhex(digits))
        if domain.key_id not in [known.domain.key_id for known in keys]:
            keys.append(KeyLine(word, domain))
    if not keys:
        raise InvalidInput(f"there is no key in {source}", hint="`torpor key init` makes one")
    return keys


def parse_keyring(text: str, *, source: str) -> Keyring:
    """The keyring in a text. Raises what `parse_lines` raises."""
    first, *others = (key.domain for key in parse_lines(text, source=source))
    return Keyring(first, tuple(others))


def load_keyring(path: Path) -> Keyring:
    """The keyring in a file. Raises NotFound; InvalidInput when others than its owner may read it.

    A keyring that others can read protects nothing, so it is not used.
    """
    return parse_keyring(read_key_file(path), source=str(path))


def create_keyring(path: Path) -> Keyring:
    """Make a file with one fresh key, mode 0600, that appears whole or not at all.

    Raises Conflict when there is one, which is left as it is.
    """
    line = new_key_line()
    fresh = _write_beside(path, f"{line}\n")
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise Conflict(
            f"there is a key in {path} already",
            hint="`torpor key show` tells which, `torpor key rotate` puts a new one before it",
        ) from None
    finally:
        fresh.unlink()
    _sync(path.parent)
    return parse_keyring(line, source=str(path))


def rotate_keyring(path: Path) -> Keyring:
    """Put a fresh key before those in the file; they stay to read what they sealed.

    Raises NotFound, InvalidInput.
    """
    text = read_key_file(path)
    parse_keyring(text, source=str(path))
    rotated = f"{new_key_line()}\n{text}"
    fresh = _write_beside(path, rotated)
    fresh.rename(path)
    _sync(path.parent)
    return parse_keyring(rotated, source=str(path))


def read_key_file(path: Path) -> str:
    """The text of a keyring's file. Raises what `load_keyring` raises of reading."""
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise InvalidInput(
                    f"others can read the key in {path}",
                    reason=f"its mode is {stat.S_IMODE(mode):04o}",
                    hint=f"chmod 0600 {path}, and think of who had access to it",
                )
            return stream.read().decode("ascii")
    except FileNotFoundError:
        raise NotFound(f"there is no key in {path}", hint="`torpor key init` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the key in {path}", reason=str(error)) from None


def _write_beside(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(descriptor)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise InvalidInput(f"cannot write the key {path}", reason=str(error)) from None
    return fresh


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
