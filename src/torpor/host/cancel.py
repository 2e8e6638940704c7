"""Cancellation of blocking work that runs in a thread for an asyncio caller.

`asyncio.to_thread` copies the context, so a token that the caller sets there is seen by the
blocking code below: child processes are killed and long copies stop at the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from torpor.host.space import no_space_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")


class Cancelled(BaseException):
    """Raised in a worker thread whose asyncio caller was cancelled."""


class CancelToken:
    """A flag that can be waited for with poll(2), set at most once."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._guard = threading.Lock()
        self._blockers: list[socket.socket] = []

    def set(self) -> None:
        """Cancel; any thread may call it."""
        with self._guard:
            os.eventfd_write(self.fd, 1)
            for blocker in self._blockers:
                _shut_down(blocker)

    @contextlib.contextmanager
    def breaking(self, connection: socket.socket) -> Iterator[None]:
        """Shut a socket down when this is set during the body, or was before."""
        with self._guard:
            self._blockers.append(connection)
            if self.is_set():
                _shut_down(connection)
        try:
            yield
        finally:
            with self._guard:
                self._blockers.remove(connection)

    def is_set(self) -> bool:
        """Whether the work should stop."""
        return bool(select.select([self.fd], [], [], 0)[0])

    def close(self) -> None:
        """Free the descriptor; call it only when no work uses the token any more."""
        os.close(self.fd)


_token: contextvars.ContextVar[CancelToken | None] = contextvars.ContextVar("cancel", default=None)


def current_token() -> CancelToken | None:
    """The token of the work under way, None outside `in_thread`."""
    return _token.get()


def checkpoint() -> None:
    """Raise Cancelled if the work under way should stop; call it in long loops."""
    token = _token.get()
    if token is not None and token.is_set():
        raise Cancelled


@contextlib.contextmanager
def uncancelled() -> Iterator[None]:
    """Let the body run to its end although the work was cancelled: it undoes what was done."""
    reset = _token.set(None)
    try:
        yield
    finally:
        _token.reset(reset)


@contextlib.contextmanager
def interruptible(connection: socket.socket) -> Iterator[None]:
    """Let a cancellation break what blocks on a socket in the body, which then raises Cancelled."""
    token = _token.get()
    if token is None:
        yield
        return
    try:
        with token.breaking(connection):
            yield
    except Exception:
        checkpoint()
        raise
    checkpoint()  # a connection that was cut may look like one that ended


@contextlib.asynccontextmanager
async def entered_in_thread(
    context: contextlib.AbstractContextManager[T],
) -> AsyncIterator[T]:
    """Enter a context whose beginning blocks, such as a lock's, in a thread; leave it at the end.

    It is left too when the caller is cancelled at the very moment at which it was entered.
    """
    with contextlib.ExitStack() as stack:
        yield await in_thread(stack.enter_context, context)


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread; on cancellation stop it, wait for its end, then re-raise.

    When this returns or raises, the work is over: nothing of it goes on behind the caller's back.
    A cancellation that comes together with the result wins: work that makes something must leave
    it where the caller finds it, not only return it. A full disk is raised as NoSpace.
    """
    token = CancelToken()
    reset = _token.set(token)
    try:
        work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    finally:
        _token.reset(reset)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        token.set()
        await _settle(work)
        raise
    except OSError as error:
        told = no_space_of(error)
        if told is error:
            raise
        raise told from error
    finally:
        token.close()


async def _settle(work: asyncio.Future[T]) -> None:
    """Wait until `work` is over, whatever its result and however often we are cancelled."""
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            continue
    if not work.cancelled():
        work.exception()


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed, or was never connected
        connection.shutdown(socket.SHUT_RDWR)
