"""What happened on a node since its daemon started: a short memory, and who wants to hear it.

Kinds: `function.deployed`, `function.removed`, `instance.ready`, `instance.removed`,
`snapshot.created`, `snapshot.removed`, `upload.done`, `upload.failed`, `upload.lost`,
`store.ahead`, `store.unreachable`. What commands beside the daemon do is not among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_KEPT: Final = 1000
_MOST_WAITING: Final = 4 * _KEPT


class Event(msgspec.Struct, frozen=True):
    """One thing that happened; `id` counts from 1, `at_ns` is CLOCK_REALTIME."""

    id: int
    at_ns: int
    kind: str
    subject: str
    data: dict[str, Any]


class Events:
    """The last events of a node. Any thread may publish; a subscriber belongs to its loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[Event] = deque(maxlen=_KEPT)
        self._count = 0
        self._heard_by: list[Callable[[Event], None]] = []

    def publish(self, kind: str, subject: str, **data: object) -> None:
        """Tell all who listen, and remember it."""
        with self._lock:
            self._count += 1
            event = Event(self._count, time.time_ns(), kind, subject, data)
            self._kept.append(event)
            heard_by = list(self._heard_by)
        for hear in heard_by:
            hear(event)

    def since(self, number: int = 0) -> list[Event]:
        """The events that are remembered and came after that number, oldest first."""
        with self._lock:
            return [event for event in self._kept if event.id > number]

    @contextlib.contextmanager
    def heard(self, hear: Callable[[Event], None]) -> Iterator[None]:
        """Have a function called for each event during the body, in the publisher's thread."""
        with self._lock:
            self._heard_by.append(hear)
        try:
            yield
        finally:
            with self._lock:
                self._heard_by.remove(hear)

    @contextlib.contextmanager
    def subscribed(self, *, after: int | None = None) -> Iterator[asyncio.Queue[Event]]:
        """A queue of the events to come; with `after`, first of those since that number.

        Who does not take them misses the oldest of the last 4000; their ids tell.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue(maxsize=_MOST_WAITING)

        def hear(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_offer, queue, event)

        with self._lock:
            for event in self._kept:
                if after is not None and event.id > after:
                    queue.put_nowait(event)
            self._heard_by.append(hear)
        try:
            yield queue
        finally:
            with self._lock:
                self._heard_by.remove(hear)


def _offer(queue: asyncio.Queue[Event], event: Event) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)
