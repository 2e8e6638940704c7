"""A store that lets only so many requests run at the same time."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, TypeVar

from torpor.errors import InvalidInput
from torpor.host.cancel import checkpoint
from torpor.store.wrapper import Operation, Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.store.interface import Store

T = TypeVar("T")

_LOOK_S: Final = 0.05


class Limit(Wrapper):
    """At most `concurrency` calls at a time, a stream being one; others wait, cancellably.

    Raises InvalidInput for less than one.
    """

    def __init__(self, inner: Store, *, concurrency: int) -> None:
        super().__init__(inner)
        if concurrency < 1:
            raise InvalidInput(f"not a number of requests at the same time: {concurrency}")
        self._places = threading.BoundedSemaphore(concurrency)

    def _call(self, operation: Operation, key: str, work: Callable[[], T]) -> T:
        checkpoint()
        while not self._places.acquire(timeout=_LOOK_S):
            checkpoint()
        try:
            return work()
        finally:
            self._places.release()
