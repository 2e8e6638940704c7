"""How an operation gets on, on standard error: bars on a terminal, else a line a phase."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from torpor.units import format_duration, format_size

if TYPE_CHECKING:
    from types import TracebackType

_WIDTH = 40


class Progress:
    """A Reporter as a context manager; any thread may call it. `quiet` tells nothing.

    On a terminal a transfer has a bar with bytes, rate and remaining time while it lasts. In both
    forms one line stays of each phase that was finished: what, how much, how long, how fast.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._began_s: dict[str, float] = {}
        self._ended: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and not self._quiet:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.DownloadColumn(binary_units=True),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True, markup=False, highlight=False),
                transient=True,
                redirect_stdout=False,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A new phase began."""
        self._print(f"{text} ...")

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """So much of a transfer is done; the first call begins its time, the full sum ends it.

        One of no bytes at all is not worth a line.
        """
        if self._quiet or total_bytes == 0:
            return
        with self._lock:
            began_s = self._began_s.setdefault(what, time.monotonic())
            ended = total_bytes is not None and done_bytes >= total_bytes
            if what in self._ended:
                return
            if ended:
                self._ended.add(what)
        if self._bar is not None:
            self._draw(what, done_bytes, total_bytes, ended=ended)
        if ended:
            self._print(_summary(what, done_bytes, time.monotonic() - began_s))

    def _draw(self, what: str, done_bytes: int, total_bytes: int | None, *, ended: bool) -> None:
        with self._lock:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what[-_WIDTH:], total=total_bytes)
            task = self._tasks[what]
        self._bar.update(task, completed=done_bytes, total=total_bytes, visible=not ended)

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, style="dim")
        elif not self._quiet:
            sys.stderr.write(f"{line}\n")


def _summary(what: str, done_bytes: int, duration_s: float) -> str:
    rate = format_size(done_bytes / max(duration_s, 1e-6))
    return f"{what}: {format_size(done_bytes)} in {format_duration(duration_s)}, {rate}/s"
