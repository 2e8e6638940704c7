"""Blocking work spread over threads, in order, with bounded memory, stopped by cancellation."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import contextvars
from typing import TYPE_CHECKING, TypeVar

from torpor.host.cancel import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def executor(workers: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """A thread pool that is empty when the body is left: nothing that it began goes on.

    What was not begun is dropped when the body raises.
    """
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)


def submit(
    pool: concurrent.futures.ThreadPoolExecutor, function: Callable[[], R]
) -> concurrent.futures.Future[R]:
    """Start a job that sees the caller's cancellation (see `host.cancel`)."""
    return pool.submit(contextvars.copy_context().run, function)


def map_ordered(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int
) -> Iterator[R]:
    """`function` of each item, computed by `workers` threads, yielded in the items' order.

    At most `ahead` results are under way or waiting at a time. The first exception of a job is
    raised in its place; when the iterator is closed or raises, all jobs have ended.
    """
    waiting: collections.deque[concurrent.futures.Future[R]] = collections.deque()

    def job(item: T) -> R:
        checkpoint()
        return function(item)

    with executor(workers) as pool:
        for item in items:
            checkpoint()
            waiting.append(pool.submit(contextvars.copy_context().run, job, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
