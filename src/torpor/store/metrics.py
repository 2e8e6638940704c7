"""A store that counts what goes through it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from torpor.errors import TorporError
from torpor.store.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torpor.store.interface import Condition, ObjectInfo, Store

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """What went through up to one moment.

    `requests`: calls by operation, failed ones too; a list or a stream is one. `errors`: those
    that failed, by the error's class. `bytes_up`, `bytes_down`: content of the calls that
    succeeded, without headers.
    """

    requests: Mapping[str, int]
    errors: Mapping[str, int]
    bytes_up: int
    bytes_down: int

    @property
    def total_requests(self) -> int:
        """All calls."""
        return sum(self.requests.values())

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`, an earlier snapshot of the same counters."""
        return Counts(
            _frozen(Counter(self.requests) - Counter(before.requests)),
            _frozen(Counter(self.errors) - Counter(before.errors)),
            self.bytes_up - before.bytes_up,
            self.bytes_down - before.bytes_down,
        )


class Counters:
    """Counters that stores add to; any thread may use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._up = self._down = 0

    def add(self, operation: Operation, *, up: int = 0, down: int = 0, error: str = "") -> None:
        """One call more."""
        with self._lock:
            self._requests[operation] += 1
            self._up += up
            self._down += down
            if error:
                self._errors[error] += 1

    def snapshot(self) -> Counts:
        """The counts of this moment, which belong together."""
        with self._lock:
            return Counts(_frozen(self._requests), _frozen(self._errors), self._up, self._down)


class Metrics(Wrapper):
    """Adds every call to `counters`."""

    def __init__(self, inner: Store, counters: Counters) -> None:
        super().__init__(inner)
        self._counters = counters

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        work = partial(self._inner.put, key, data, condition=condition)
        return self._count("put", work, up=lambda _: len(data))

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        sent = 0

        def counted() -> Iterator[bytes]:
            nonlocal sent
            for part in parts:
                sent += len(part)
                yield part

        work = partial(self._inner.put_stream, key, counted())
        self._count("put_stream", work, up=lambda _: sent)

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        work = partial(self._inner.get, key, limit_bytes=limit_bytes)
        return self._count("get", work, down=lambda got: len(got[0]))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See Store."""
        work = partial(self._inner.get_range, key, offset, length)
        return self._count("get_range", work, down=len)

    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """See Store."""
        work = partial(self._inner.get_prefix, key, length)
        return self._count("get_prefix", work, down=lambda got: len(got[0]))

    def _call(self, operation: Operation, key: str, work: Callable[[], T]) -> T:
        return self._count(operation, work)

    def _count(
        self,
        operation: Operation,
        work: Callable[[], T],
        *,
        up: Callable[[T], int] = lambda _: 0,
        down: Callable[[T], int] = lambda _: 0,
    ) -> T:
        try:
            result = work()
        except BaseException as error:
            known = isinstance(error, TorporError)
            self._counters.add(operation, error=type(error).__name__ if known else "other")
            raise
        self._counters.add(operation, up=up(result), down=down(result))
        return result


def _frozen(counts: Mapping[str, int]) -> Mapping[str, int]:
    return MappingProxyType(dict(counts))
