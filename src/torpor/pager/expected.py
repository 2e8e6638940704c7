"""Windows that a push is bringing: who reads one has it from there instead of asking the store."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from torpor.snapshot.windows import window_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Arrival:
    """Some windows of one file that arrive together. Any thread.

    Either `bring` or `give_up` is called once; `windows` stay as they were given.
    """

    def __init__(self, windows: Sequence[int]) -> None:
        self.windows = windows
        self._ended = threading.Event()
        self._content: dict[int, memoryview] = {}

    def bring(self, content: bytes, *, size_bytes: int) -> None:
        """All of them are here, one after the other in `content`; their file has `size_bytes`."""
        view, position = memoryview(content), 0
        for window in self.windows:
            length = window_length(window, size_bytes)
            self._content[window] = view[position : position + length]
            position += length
        self._ended.set()

    def give_up(self) -> None:
        """They do not come; nothing happens if they are here."""
        self._ended.set()

    def wait(self, window: int, timeout_s: float) -> memoryview | None:
        """One window's content; None when it does not come, or not in time."""
        return self._content.get(window) if self._ended.wait(timeout_s) else None


class Expected:
    """The windows of one file that are expected, each with its arrival. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrivals: dict[int, Arrival] = {}

    def add(self, arrival: Arrival) -> None:
        """Expect what arrives; a window that was expected already now comes with this."""
        with self._lock:
            self._arrivals |= dict.fromkeys(arrival.windows, arrival)

    def remove(self, arrival: Arrival) -> None:
        """Expect it no more, and let its content go as soon as no reader has it."""
        with self._lock:
            for window in arrival.windows:
                if self._arrivals.get(window) is arrival:
                    del self._arrivals[window]

    def among(self, windows: Iterable[int]) -> dict[int, Arrival]:
        """Those of the windows that are expected."""
        if not self._arrivals:
            return {}
        with self._lock:
            found = ((window, self._arrivals.get(window)) for window in windows)
            return {window: arrival for window, arrival in found if arrival is not None}
