"""SIGINT and SIGTERM of a command, heard from its first moment to its last.

Before and after the command's asynchronous work a signal raises KeyboardInterrupt; during it every
signal cancels the work, which cleans up however often that happens; once the outcome is known
signals are of no more use and are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""The exit code of a command that was interrupted."""


def _raise() -> None:
    raise KeyboardInterrupt


_react: Callable[[], object] = _raise


def _hear(_signum: int, _frame: FrameType | None) -> None:
    _react()


def listen() -> None:
    """Hear both signals from now on. Main thread only."""
    for signum in _SIGNALS:
        signal.signal(signum, _hear)


@contextlib.contextmanager
def cancelling(task: asyncio.Task[object]) -> Iterator[None]:
    """Let signals cancel a task of the running loop during the body, and be ignored after it."""
    global _react  # signals are the process's own
    loop = asyncio.get_running_loop()
    _react = lambda: loop.call_soon_threadsafe(task.cancel)  # noqa: E731
    try:
        yield
    finally:
        _react = lambda: None  # noqa: E731
        for signum in _SIGNALS:
            if signal.getsignal(signum) is _hear:  # an ending interpreter puts back the default
                signal.signal(signum, signal.SIG_IGN)
