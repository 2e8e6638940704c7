"""Advisory locks between processes: flock(2) on a file that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from typing import TYPE_CHECKING, Final

from torpor.errors import Conflict
from torpor.host.cancel import checkpoint, current_token
from torpor.host.space import no_space_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_RETRY_S: Final = 0.02
_NAME_BYTES: Final = 32


@contextlib.contextmanager
def exclusive(path: Path, *, timeout_s: float, what: str) -> Iterator[None]:
    """Hold the lock alone.

    Raises Conflict when `what` is still taken after `timeout_s`, NoSpace.
    """
    with _locked(path, fcntl.LOCK_EX, timeout_s, what):
        yield


@contextlib.contextmanager
def shared(path: Path, *, timeout_s: float, what: str) -> Iterator[None]:
    """Hold the lock together with other sharers. Raises Conflict as `exclusive` does."""
    with _locked(path, fcntl.LOCK_SH, timeout_s, what):
        yield


@contextlib.contextmanager
def in_use(directory: Path) -> Iterator[bool]:
    """Mark a directory as in use during the body, together with others. It needs no room.

    False when it is gone, or when somebody is just looking whether it is in use.
    """
    with _tried(directory, fcntl.LOCK_SH) as taken:
        yield taken


def is_in_use(directory: Path) -> bool:
    """Whether anybody has marked a directory with `in_use`; a process that died has not."""
    with _tried(directory, fcntl.LOCK_EX) as taken:
        return not taken and directory.exists()


@contextlib.contextmanager
def _tried(directory: Path, kind: int) -> Iterator[bool]:
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            yield False
        else:
            yield True


@contextlib.contextmanager
def _locked(path: Path, kind: int, timeout_s: float, what: str) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise no_space_of(error, path) from None
    try:
        _take(descriptor, kind, timeout_s, what)
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Say who holds it, for the error of others; on a full disk that stays unsaid."""
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, str(os.getpid()).encode().ljust(_NAME_BYTES), 0)


def _take(descriptor: int, kind: int, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise _conflict(descriptor, what) from None
        token = current_token()
        select.select([token.fd] if token else [], [], [], _RETRY_S)
        checkpoint()


def _conflict(descriptor: int, what: str) -> Conflict:
    holder = os.pread(descriptor, _NAME_BYTES, 0).decode(errors="replace").strip()
    return Conflict(
        f"another command is at work on {what}",
        reason=f"process {holder}" if holder else "",
        hint="wait for it to end, then try again",
    )
