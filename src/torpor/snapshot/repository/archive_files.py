"""Where archives are written to and read from: files, and pipes that may stall. Blocking."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import stat
import tempfile
from typing import TYPE_CHECKING, Final

from torpor.errors import InvalidInput, NoSpace, NotFound, OutsideError
from torpor.host.cancel import checkpoint, current_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_STEP_BYTES: Final = 4 * 1024 * 1024


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Callable[[bytes], None]]:
    """What appends to a file that takes the place of `path`, mode 0600, when the body succeeds.

    It is on the disk then; of a body that fails nothing is left, and what was at `path` stays.
    Raises InvalidInput for a path that cannot be written, NoSpace.
    """
    if path.exists() and not path.is_file():
        raise InvalidInput(f"{path} is not a file", hint="name a file, or - for standard output")
    fresh = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidInput(f"cannot write {path}", reason=str(error)) from None
    try:
        yield lambda data: _append(descriptor, data, str(path))
        with _written_to(str(path)):
            os.fsync(descriptor)
            fresh.rename(path)
        _sync(path.parent)
    finally:
        os.close(descriptor)
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def pipe(descriptor: int, name: str) -> Iterator[Callable[[bytes], None]]:
    """What writes to an open pipe, without hanging on a reader that stalls when it is cancelled.

    Raises InvalidInput for a terminal, OutsideError when the reader went away.
    """
    if os.isatty(descriptor):
        raise InvalidInput(
            "an archive is not for a terminal", hint="name a file, or send it into a pipe"
        )
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        yield lambda data: _append(descriptor, data, name)
        return
    yield lambda data: _push(descriptor, data, name)


@contextlib.contextmanager
def existing_file(path: Path) -> Iterator[int]:
    """A file open for reading. Raises NotFound, InvalidInput."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except OSError as error:
        raise InvalidInput(f"cannot read {path}", reason=str(error)) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def spooled(descriptor: int, directory: Path) -> Iterator[int]:
    """Everything that comes from an open pipe, as a file without a name below `directory`.

    What is a regular file already is used as it is. Raises NoSpace, InvalidInput for a terminal.
    """
    if os.isatty(descriptor):
        raise InvalidInput("an archive does not come from a terminal", hint="name a file")
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        yield descriptor
        return
    with tempfile.TemporaryFile(dir=directory, prefix=".archive-", buffering=0) as file:
        while True:
            _wait(descriptor, select.POLLIN)
            part = os.read(descriptor, _STEP_BYTES)
            if not part:
                break
            _append(file.fileno(), part, str(directory))
        yield file.fileno()


def _append(descriptor: int, data: bytes, name: str) -> None:
    view = memoryview(data)
    with _written_to(name):
        while view:
            checkpoint()
            view = view[os.write(descriptor, view[:_STEP_BYTES]) :]


def _push(descriptor: int, data: bytes, name: str) -> None:
    """A pipe that polls as writable takes PIPE_BUF bytes without blocking (pipe(7))."""
    view = memoryview(data)
    with _written_to(name):
        while view:
            _wait(descriptor, select.POLLOUT)
            view = view[os.write(descriptor, view[: select.PIPE_BUF]) :]


def _wait(descriptor: int, events: int) -> None:
    poller = select.poll()
    poller.register(descriptor, events)
    token = current_token()
    if token is not None:
        poller.register(token.fd, select.POLLIN)
    poller.poll()
    checkpoint()


@contextlib.contextmanager
def _written_to(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"the disk of {name} is full", reason=str(error)) from None
        raise OutsideError(f"cannot write {name}", reason=str(error)) from None


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
