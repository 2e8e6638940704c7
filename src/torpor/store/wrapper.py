"""What all wrappers share: a Store that passes every call on through one method."""

from __future__ import annotations

import abc
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from torpor.store.interface import Condition, ObjectInfo, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

Operation = Literal[
    "put",
    "put_stream",
    "get",
    "get_range",
    "get_prefix",
    "head",
    "list",
    "delete",
    "delete_many",
    "delete_leftovers",
]


class Wrapper(Store):
    """Passes every call on through `_call`; a wrapper overrides that and what it needs besides."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    @abc.abstractmethod
    def _call(self, operation: Operation, key: str, work: Callable[[], T]) -> T:
        """Do `work`, once or more; `key` is a prefix for list, the first key for delete_many."""

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        return self._call("put", key, lambda: self._inner.put(key, data, condition=condition))

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        return self._call("put_stream", key, lambda: self._inner.put_stream(key, parts))

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        return self._call("get", key, lambda: self._inner.get(key, limit_bytes=limit_bytes))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See Store."""
        return self._call("get_range", key, lambda: self._inner.get_range(key, offset, length))

    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """See Store."""
        return self._call("get_prefix", key, lambda: self._inner.get_prefix(key, length))

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return self._call("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        return iter(self._call("list", prefix, lambda: [*self._inner.list(prefix)]))

    def delete(self, key: str) -> None:
        """See Store."""
        return self._call("delete", key, lambda: self._inner.delete(key))

    def delete_many(self, keys: Iterable[str]) -> None:
        """See Store."""
        if several := [*keys]:
            self._call("delete_many", several[0], lambda: self._inner.delete_many(several))

    def delete_leftovers(self, *, older_than_s: float) -> int:
        """See Store."""
        work = partial(self._inner.delete_leftovers, older_than_s=older_than_s)
        return self._call("delete_leftovers", "", work)
