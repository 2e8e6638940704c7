"""A store that repeats what failed in passing, for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TypeVar

from torpor.errors import Damaged, ObjectConflict, ObjectMissing, StoreUnreachable
from torpor.store.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torpor.store.clock import Clock
    from torpor.store.interface import Condition, Store

T = TypeVar("T")

_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 3.0


class Retry(Wrapper):
    """Repeats a call that ended in StoreUnreachable until `budget_s` after its first failure.

    Waits are drawn evenly from 0 to a bound that doubles from 0.1 to 3 s ("full jitter": Brooker,
    "Exponential Backoff And Jitter", AWS 2015), so that clients of a store that came back do not
    come all at once. The last repeat begins when the budget ends; how long one request may last
    is the settings' `store_timeout_s`. Other errors come through at once.

    A conditional put may have taken effect though its answer was lost, so that its repeat meets
    its own object: then the object is read back, and the same content is success. A stream whose
    parts cannot be iterated again is not repeated here.
    """

    def __init__(
        self,
        inner: Store,
        *,
        budget_s: float,
        clock: Clock,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        super().__init__(inner)
        self._budget_s = budget_s
        self._clock = clock
        self._jitter = jitter

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        unsure = False
        met: ObjectConflict | None = None

        def attempt() -> str:
            nonlocal unsure, met
            if met is None:
                try:
                    return self._inner.put(key, data, condition=condition)
                except StoreUnreachable:
                    unsure = True
                    raise
                except ObjectConflict as conflict:
                    if not unsure:
                        raise
                    met = conflict
            etag = self._own_write(key, data)
            if etag is None:
                raise met
            return etag

        return self._call("put", key, attempt)

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        if isinstance(parts, Iterator):
            self._inner.put_stream(key, parts)
        else:
            super().put_stream(key, parts)

    def _own_write(self, key: str, data: bytes) -> str | None:
        """The etag if the object has this content, as when an earlier attempt wrote it."""
        try:
            stored, etag = self._inner.get(key, limit_bytes=len(data))
        except (ObjectMissing, Damaged):
            return None
        return etag if stored == data else None

    def _call(self, operation: Operation, key: str, work: Callable[[], T]) -> T:
        began_s: float | None = None
        bound_s, attempts = _FIRST_WAIT_S, 0
        while True:
            attempts += 1
            try:
                return work()
            except StoreUnreachable as error:
                now_s = self._clock.now_s()
                began_s = now_s if began_s is None else began_s
                left_s = began_s + self._budget_s - now_s
                if left_s <= 0:
                    raise _gave_up(error, attempts, now_s - began_s) from None
            self._clock.wait(min(self._jitter(0.0, bound_s), left_s))
            bound_s = min(2 * bound_s, _LONGEST_WAIT_S)


def _gave_up(error: StoreUnreachable, attempts: int, seconds: float) -> StoreUnreachable:
    if attempts == 1:
        return error
    tried = f"tried {attempts} times in {seconds:.1f} s"
    reason = f"{error.reason}; {tried}" if error.reason else tried
    return StoreUnreachable(error.message, reason=reason, hint=error.hint)
