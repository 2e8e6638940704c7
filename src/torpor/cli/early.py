"""Signals that come while the command line is still loading: kept for `interrupt`.

This imports nothing that takes time: what comes before `listen` ends the process as if it had not
begun, which is true.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import FrameType

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_was_heard = False


def hear(_signum: int, _frame: FrameType | None) -> None:
    """The handler of both signals: remember that one came."""
    global _was_heard  # signals are the process's own
    _was_heard = True


def listen() -> None:
    """Hear both signals from now on. Main thread only."""
    for signum in SIGNALS:
        signal.signal(signum, hear)


def was_heard() -> bool:
    """Whether one came since `listen`."""
    return _was_heard
