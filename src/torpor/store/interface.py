"""The Store interface: named objects in one bucket below one prefix."""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_KEY_BYTES = 512


@dataclass(frozen=True)
class ObjectInfo:
    """An object's key below the prefix, its length, the tag of its content, when it was written.

    `last_modified` is in seconds since 1970 by the STORE's clock: compare it with other objects'
    times, never with this host's. S3 gives milliseconds in a list and whole seconds, rounded
    down, elsewhere.
    """

    key: str
    size_bytes: int
    etag: str
    last_modified: float


@dataclass(frozen=True)
class Absent:
    """Put only if there is no such object yet."""


@dataclass(frozen=True)
class Etag:
    """Put only if the object is there and its content still has this tag."""

    value: str


Condition = Absent | Etag


class Store(abc.ABC):
    """Blocking; any thread may call any method, at the same time.

    Keys are relative, `/`-separated, made of letters, digits and `._-`, no part of them beginning
    with a dot; another one raises InvalidInput. Every method may raise StoreUnreachable (no
    answer, no whole answer, or the store says "not now": worth repeating), StoreDenied, NoSpace,
    or StoreError (no such bucket, refused for another reason); what else it raises is said there.

    Bytes that a method returns are whole: an answer that was cut off on the way is
    StoreUnreachable, an object that is itself too short is Damaged. Whether the content is right
    is for the caller to check.

    Inside `host.cancel.in_thread` a method raises Cancelled between its steps; a request that is
    under way is waited for, at most `store_timeout_s`.
    """

    @abc.abstractmethod
    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """Write an object whole, replacing it; returns its new etag.

        Readers see the old content or the new, never a mixture. Raises ObjectConflict, changing
        nothing, when the condition does not hold. After StoreUnreachable it may have been written
        or not.
        """

    @abc.abstractmethod
    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """Write an object of unknown length from parts of any size, in bounded memory.

        `parts` is consumed in a thread of the caller's or of the store's choice, one part at a
        time; it must not call the same store. What it raises comes through unchanged. On any
        failure nothing is visible under the key and the upload is aborted. Parts that can be
        iterated again (a list, not a generator) may be, to repeat an upload.
        """

    @abc.abstractmethod
    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """A whole object and its etag.

        Raises ObjectMissing, and Damaged if it is larger than the limit, before reading it.
        """

    @abc.abstractmethod
    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; nothing is asked for none.

        Raises ObjectMissing, Damaged if the object ends before, InvalidInput for negative numbers.
        """

    @abc.abstractmethod
    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """The first `length` bytes, or all if it has fewer, and what it is as a whole.

        One request, two for an empty object. Raises ObjectMissing, InvalidInput for a length
        below 1.
        """

    @abc.abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """What an object is, without its content. Raises ObjectMissing."""

    @abc.abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key begins with `prefix`, ending in `/` or empty, by key.

        The list is complete before the first is given. Objects whose names are no keys are left
        out. What is written or deleted meanwhile may be in it or not.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""

    @abc.abstractmethod
    def delete_many(self, keys: Iterable[str]) -> None:
        """Remove objects, in as few requests as the store can; those not there are fine.

        When it raises some may be gone; repeating it is safe.
        """

    @abc.abstractmethod
    def delete_leftovers(self, *, older_than_s: float) -> int:
        """Remove what writers that were killed left and no list shows; how many it was.

        Only what is older than `older_than_s`, for writers that are still at work. A file store
        has such files. Unfinished uploads in a bucket are for its lifecycle rule: 0.
        """


def check_key(key: str) -> str:
    """The key; raises InvalidInput for one that could leave the prefix or that stores differ on."""
    if len(key) > _KEY_BYTES or _KEY.fullmatch(key) is None:
        raise InvalidInput(f"not an object key: {key[:80]!r}")
    return key


def is_key(text: str) -> bool:
    """Whether an object's name is a key of ours."""
    return len(text) <= _KEY_BYTES and _KEY.fullmatch(text) is not None


def check_prefix(prefix: str) -> str:
    """The prefix of a list; raises InvalidInput unless it is empty or a key with `/` after it."""
    if prefix and not (prefix.endswith("/") and is_key(prefix[:-1])):
        raise InvalidInput(f"not a prefix of object keys: {prefix[:80]!r}")
    return prefix


def check_range(offset: int, length: int) -> None:
    """Raise InvalidInput for a range that no object can have."""
    if offset < 0 or length < 0:
        raise InvalidInput(f"not a range: {length} bytes from {offset}")
