"""Cancellation of blocking work that runs in a thread for an asyncio caller.

`asyncio.to_thread` copies the context, so a token that the caller sets there is seen by the
blocking code below: child processes are killed and long copies stop at the next step.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import select
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class Cancelled(BaseException):
    """Raised in a worker thread whose asyncio caller was cancelled."""


class CancelToken:
    """A flag that can be waited for with poll(2), set at most once."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """Cancel; any thread may call it."""
        os.eventfd_write(self.fd, 1)

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


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread; on cancellation stop it, wait for its end, then re-raise.

    When this returns or raises, the work is over: nothing of it goes on behind the caller's back.
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
