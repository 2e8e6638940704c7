"""The Store interface: named objects in one bucket below one prefix."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True)
class ObjectInfo:
    """An object's key below the prefix, its length, and the tag of its present content."""

    key: str
    size_bytes: int
    etag: str


@dataclass(frozen=True)
class Absent:
    """Put only if there is no such object yet."""


@dataclass(frozen=True)
class Etag:
    """Put only if the object's content still has this tag."""

    value: str


Condition = Absent | Etag


class Store(abc.ABC):
    """Blocking; any thread may call any method, at the same time.

    Keys are relative, `/`-separated, without `..`; another one raises InvalidInput. Every method
    may raise StoreUnreachable (no answer), StoreDenied (credentials), or StoreError; what else it
    raises is said there.
    """

    @abc.abstractmethod
    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """Write an object whole, replacing it; returns its etag.

        Raises ObjectConflict, changing nothing, when the condition does not hold.
        """

    @abc.abstractmethod
    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """Write an object from parts, in bounded memory. Nothing is visible on failure."""

    @abc.abstractmethod
    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """An object and its etag. Raises ObjectMissing, Damaged if it is larger than the limit."""

    @abc.abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`. Raises ObjectMissing, Damaged if it is shorter."""

    @abc.abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Length and etag. Raises ObjectMissing."""

    @abc.abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, ending in `/` or empty, by key."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
