"""Stores round a store: retry what fails in passing, limit concurrency, count, make faults."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from torpor.errors import ObjectConflict, ObjectMissing, StoreError, StoreUnreachable
from torpor.host.cancel import checkpoint
from torpor.store.interface import Condition, ObjectInfo, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torpor.errors import TorporError

T = TypeVar("T")

_FIRST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 5.0


class Wrapper(Store):
    """Passes every call on through `_call`."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner

    def _call(self, operation: str, key: str, work: Callable[[], T]) -> T:
        raise NotImplementedError(operation)

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        return self._call("put", key, lambda: self._inner.put(key, data, condition=condition))

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        return self._call("put_stream", key, lambda: self._inner.put_stream(key, parts))

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        return self._call("get", key, lambda: self._inner.get(key, limit_bytes=limit_bytes))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        return self._call("get_range", key, lambda: self._inner.get_range(key, start, length))

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return self._call("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        return iter(self._call("list", prefix, lambda: [*self._inner.list(prefix)]))

    def delete(self, key: str) -> None:
        """See Store."""
        return self._call("delete", key, lambda: self._inner.delete(key))


class Retry(Wrapper):
    """Repeats what was not answered, waiting longer each time, with jitter.

    A conditional put whose answer was lost is settled by reading the object back. A stream is not
    repeated here: its caller can make it again.
    """

    def __init__(self, inner: Store, *, retries: int) -> None:
        super().__init__(inner)
        self._retries = retries

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        unsure = False

        def attempt() -> str:
            nonlocal unsure
            try:
                return self._inner.put(key, data, condition=condition)
            except StoreUnreachable:
                unsure = True
                raise
            except ObjectConflict:
                if unsure:
                    stored, etag = self._inner.get(key, limit_bytes=len(data))
                    if stored == data:
                        return etag
                raise

        return self._call("put", key, attempt)

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        self._inner.put_stream(key, parts)

    def _call(self, operation: str, key: str, work: Callable[[], T]) -> T:
        wait_s = _FIRST_WAIT_S
        for _ in range(self._retries):
            try:
                return work()
            except StoreUnreachable:
                _wait(random.uniform(wait_s / 2, wait_s))
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        return work()


class Limit(Wrapper):
    """Lets only so many requests run at the same time."""

    def __init__(self, inner: Store, *, concurrency: int) -> None:
        super().__init__(inner)
        self._places = threading.BoundedSemaphore(concurrency)

    def _call(self, operation: str, key: str, work: Callable[[], T]) -> T:
        with self._places:
            checkpoint()
            return work()


@dataclass
class Fault:
    """What happens to the next `times` calls of an operation on keys that contain `key`.

    `kind`: `error` fails before the call, `lost answer` after it took effect, `missing` says that
    the object is not there, `truncate` and `flip` damage what is read.
    """

    operation: str
    kind: str
    key: str = ""
    times: int = 1


@dataclass
class _Plan:
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, operation: str, key: str) -> str:
        """The kind of the fault that is due, or nothing."""
        with self.lock:
            for fault in self.faults:
                if fault.operation == operation and fault.key in key and fault.times > 0:
                    fault.times -= 1
                    return fault.kind
        return ""


class Faults(Wrapper):
    """A store that fails as it is told to; a tool for tests and benchmarks."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._plan = _Plan()

    def inject(self, *faults: Fault) -> None:
        """Add faults to come."""
        self._plan.faults.extend(faults)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        return _damage(self._plan.take("damage", key), self._inner_range(key, start, length))

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        data, etag = super().get(key, limit_bytes=limit_bytes)
        return _damage(self._plan.take("damage", key), data), etag

    def _inner_range(self, key: str, start: int, length: int) -> bytes:
        return super().get_range(key, start, length)

    def _call(self, operation: str, key: str, work: Callable[[], T]) -> T:
        kind = self._plan.take(operation, key)
        error = _ERRORS.get(kind)
        if error is not None and kind != "lost answer":
            raise error(f"made to fail: {operation} {key}")
        result = work()
        if error is not None:
            raise error(f"made to lose the answer of {operation} {key}")
        return result


_ERRORS: dict[str, type[TorporError]] = {
    "error": StoreUnreachable,
    "lost answer": StoreUnreachable,
    "missing": ObjectMissing,
    "failure": StoreError,
}


def _damage(kind: str, data: bytes) -> bytes:
    if kind == "truncate":
        return data[: len(data) // 2]
    if kind == "flip" and data:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return data


def _wait(seconds: float) -> None:
    """Wait in small steps, so that a cancelled caller is not kept."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        checkpoint()
        time.sleep(min(left, 0.05))
