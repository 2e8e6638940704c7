"""Answers that come bit by bit: progress as lines of JSON, events as server-sent ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.responses import Response

from torpor.api.problems import bug_of, problem_of
from torpor.errors import NoSpace, TorporError
from torpor.host.space import no_space_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from starlette.types import Message, Receive, Scope, Send

    from torpor.node.events import Event
    from torpor.node.parts import Reporter

log = logging.getLogger("torpor.api")

LINES: Final = "application/x-ndjson"
_STEP_EVERY_S: Final = 0.1
_KEEP_ALIVE_S: Final = 15.0


class Streamed(Response):
    """An answer whose pieces come from an iterator, which is closed when the client leaves.

    `until`: it is also closed when that is set.
    """

    def __init__(
        self,
        pieces: Callable[[], AsyncIterator[bytes]],
        *,
        media_type: str,
        until: asyncio.Event | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._pieces, self._until = pieces, until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        tasks = [
            asyncio.ensure_future(self._send(send)),
            asyncio.ensure_future(_until_disconnected(receive)),
        ]
        if self._until is not None:
            tasks.append(asyncio.ensure_future(self._closed(self._until)))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await _settle(tasks)
        if not tasks[0].cancelled():
            tasks[0].result()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async with contextlib.aclosing(self._pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _closed(self, until: asyncio.Event) -> None:
        await until.wait()


async def _until_disconnected(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def _settle(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Wait for all, however often we are cancelled: what is undone comes to its end."""
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)


class QueueReporter:
    """A Reporter whose words go into a queue of a loop; any thread may call it."""

    def __init__(self, queue: asyncio.Queue[dict[str, Any] | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = queue
        self._stepped_at: dict[str, float] = {}

    def say(self, text: str) -> None:
        """See Reporter."""
        self._put({"say": text})

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """See Reporter; not every step is passed on, but the first and the last are."""
        now = time.monotonic()
        ended = total_bytes is not None and done_bytes >= total_bytes
        if not ended and now - self._stepped_at.get(what, 0.0) < _STEP_EVERY_S:
            return
        self._stepped_at[what] = now
        self._put({"what": what, "done_bytes": done_bytes, "total_bytes": total_bytes})

    def _put(self, progress: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, {"progress": progress})


async def progress_lines(
    work: Callable[[Reporter], Awaitable[msgspec.Raw]],
) -> AsyncIterator[bytes]:
    """Lines of JSON: `progress` while it works, then `result` or `problem`.

    Closed before the end it cancels the work and waits until that has undone what it had begun.
    """
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    task = asyncio.ensure_future(work(QueueReporter(queue)))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (line := await queue.get()) is not None:
            yield msgspec.json.encode(line) + b"\n"
        try:
            yield msgspec.json.encode({"result": task.result()}) + b"\n"
        except TorporError as error:
            log.info("refused error=%s", error)
            yield msgspec.json.encode({"problem": problem_of(error)}) + b"\n"
        except Exception as error:
            told = no_space_of(error)
            if not isinstance(told, NoSpace):
                log.exception("internal error")
                told = bug_of(error)
            yield msgspec.json.encode({"problem": problem_of(told)}) + b"\n"
    finally:
        task.cancel()
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()


async def server_sent(queue: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    """Events as text/event-stream, and a comment now and then that keeps the connection."""
    yield b": events of this node\n\n"
    while True:
        try:
            async with asyncio.timeout(_KEEP_ALIVE_S):
                event = await queue.get()
        except TimeoutError:
            yield b": nothing new\n\n"
            continue
        data = msgspec.json.encode(event).decode()
        yield f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n".encode()
