"""When parts of the pager's work began and ended, on the clock that all processes share."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class Span(NamedTuple):
    """One part: its name, and its begin and end in seconds of CLOCK_MONOTONIC."""

    name: str
    begin_s: float
    end_s: float


class Spans:
    """Spans in the order in which they ended. Any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended: list[Span] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the body; a body that raises is not recorded."""
        begin_s = time.monotonic()
        yield
        with self._lock:
            self._ended.append(Span(name, begin_s, time.monotonic()))

    def ended(self) -> list[Span]:
        """What has ended so far, by begin."""
        with self._lock:
            return sorted(self._ended, key=lambda span: span.begin_s)
