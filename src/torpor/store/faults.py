"""A store that fails as it is told to; for tests and benchmarks.

Which calls fail is fixed by the plan alone: by operation, by what the key contains, and by how
many such calls came before.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from torpor.errors import ObjectMissing, StoreDenied, StoreError, StoreUnreachable
from torpor.store.clock import Clock, SystemClock
from torpor.store.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.store.interface import ObjectInfo, Store

T = TypeVar("T")

FaultKind = Literal[
    "error",
    "lost answer",
    "timeout",
    "cut off",
    "missing",
    "denied",
    "failure",
    "delay",
    "do",
    "truncate",
    "flip",
]
"""What a fault does.

    error        StoreUnreachable before the call
    lost answer  StoreUnreachable after it took effect
    timeout      `delay_s` later StoreUnreachable; the call takes no effect
    cut off      StoreUnreachable as if half of the answer or of the upload had been on its way
    missing, denied, failure    ObjectMissing, StoreDenied, StoreError before the call
    delay        the call, `delay_s` later
    do           the call, after `action()`: kill a server, wait at a barrier
    truncate     a lie: half of what was read is returned as if it were all
    flip         a lie: one bit in the middle of what was read is another
"""

_BEFORE: dict[FaultKind, type[StoreError]] = {
    "error": StoreUnreachable,
    "timeout": StoreUnreachable,
    "missing": ObjectMissing,
    "denied": StoreDenied,
    "failure": StoreError,
}
_AFTER: set[FaultKind] = {"lost answer", "cut off"}
_READS: set[Operation] = {"get", "get_range", "get_prefix"}


@dataclass(frozen=True)
class Fault:
    """What happens to some calls.

    `operation`: `any`, or `read` for all that return content. `key`: part of the key. The first
    `after` calls that fit are let through, the next `times` are hit (None: all).
    """

    operation: Operation | Literal["any", "read"]
    kind: FaultKind
    key: str = ""
    after: int = 0
    times: int | None = 1
    delay_s: float = 0.0
    action: Callable[[], None] | None = None

    def fits(self, operation: Operation, key: str) -> bool:
        """Whether such a call is one of those it counts."""
        named = self.operation in ("any", operation)
        return (named or (self.operation == "read" and operation in _READS)) and self.key in key

    def hits(self, number: int) -> bool:
        """Whether the call that is `number`th of those that fit, from 0, is hit."""
        return number >= self.after and (self.times is None or number < self.after + self.times)


@dataclass(frozen=True)
class Call:
    """A call that was made, and the kind of the fault that hit it, or nothing."""

    operation: Operation
    key: str
    fault: FaultKind | Literal[""] = ""


class Faults(Wrapper):
    """Lets a plan of faults hit the calls; of several that fit the first injected does."""

    def __init__(self, inner: Store, *faults: Fault, clock: Clock | None = None) -> None:
        super().__init__(inner)
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._plan = [*faults]
        self._seen: Counter[int] = Counter()
        self._calls: list[Call] = []

    def inject(self, *faults: Fault) -> None:
        """Add faults; they count the calls from now on."""
        with self._lock:
            self._plan += faults

    def heal(self) -> None:
        """Forget the plan."""
        with self._lock:
            self._plan.clear()
            self._seen.clear()

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls so far, in the order in which they came."""
        with self._lock:
            return tuple(self._calls)

    def _take(self, operation: Operation, key: str) -> Fault | None:
        with self._lock:
            found = None
            for place, fault in enumerate(self._plan):
                if not fault.fits(operation, key):
                    continue
                number = self._seen[place]
                self._seen[place] += 1
                if found is None and fault.hits(number):
                    found = fault
            self._calls.append(Call(operation, key, found.kind if found else ""))
            return found

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        work = partial(self._inner.get, key, limit_bytes=limit_bytes)
        return self._run("get", key, work, lambda kind, got: (_lie(kind, got[0]), got[1]))

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See Store."""
        return self._run(
            "get_range", key, partial(self._inner.get_range, key, offset, length), _lie
        )

    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """See Store."""
        work = partial(self._inner.get_prefix, key, length)
        return self._run("get_prefix", key, work, lambda kind, got: (_lie(kind, got[0]), got[1]))

    def _call(self, operation: Operation, key: str, work: Callable[[], T]) -> T:
        return self._run(operation, key, work, lambda _, result: result)

    def _run(
        self,
        operation: Operation,
        key: str,
        work: Callable[[], T],
        lie: Callable[[FaultKind, T], T],
    ) -> T:
        fault = self._take(operation, key)
        if fault is None:
            return work()
        self._fail_before(fault, operation, key)
        result = work()
        if fault.kind in _AFTER:
            raise StoreUnreachable(f"made to fail: {operation} {key}", reason=fault.kind)
        return lie(fault.kind, result)

    def _fail_before(self, fault: Fault, operation: Operation, key: str) -> None:
        if fault.delay_s:
            self._clock.wait(fault.delay_s)
        if fault.action is not None:
            fault.action()
        error = _BEFORE.get(fault.kind)
        if fault.kind == "cut off" and operation not in _READS:
            error = StoreUnreachable
        if error is not None:
            raise error(f"made to fail: {operation} {key}", reason=fault.kind)


def _lie(kind: FaultKind, data: bytes) -> bytes:
    if kind == "truncate":
        return data[: len(data) // 2]
    if kind == "flip" and data:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return data
