"""SIGINT and SIGTERM of a command, heard from its first moment to its last.

A signal is never an exception at any odd place. One that comes before the command's asynchronous
work is remembered and cancels that as soon as it begins; during the work every signal cancels it,
and it cleans up however often that happens; once the outcome is known signals are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from typing import TYPE_CHECKING

from torpor.cli.early import SIGNALS, hear, was_heard

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERRUPTED = 130
"""The exit code of a command that was interrupted."""


@contextlib.contextmanager
def cancelling(task: asyncio.Task[object]) -> Iterator[None]:
    """Let signals cancel a task of the running loop during the body, and be ignored after it."""
    with _woken_by_signals(task):
        if was_heard():
            task.cancel()
        try:
            yield
        finally:
            for signum in SIGNALS:
                if signal.getsignal(signum) is hear:  # an ending interpreter puts the default back
                    signal.signal(signum, signal.SIG_IGN)


@contextlib.contextmanager
def _woken_by_signals(task: asyncio.Task[object]) -> Iterator[None]:
    """Cancel the task at every signal.

    A handler in Python runs when the main thread next does something. One that sleeps in its loop
    is not woken by a signal that another thread got, nor by one that came just before it slept: it
    is by a descriptor to which the interpreter writes at once.
    """
    loop = asyncio.get_running_loop()
    reading, writing = socket.socketpair()

    def cancel() -> None:
        if set(reading.recv(4096)) & set(SIGNALS):
            task.cancel()

    with reading, writing:
        reading.setblocking(False)
        writing.setblocking(False)
        loop.add_reader(reading, cancel)
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(reading)
