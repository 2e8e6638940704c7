"""The client of a daemon for asyncio; the command line uses it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
import msgspec

from torpor.api import calls
from torpor.api.calls import Call
from torpor.api.wire import Lines, LineSplitter, Where, decode, event_of, refuse_problem, request_of
from torpor.node.events import Event
from torpor.node.invoke import Request
from torpor.node.parts import Reporter, Silent
from torpor.node.views import (
    CapturedView,
    DeployedView,
    ForkedView,
    FunctionView,
    InstanceView,
    InvokedView,
    LogsView,
    RemovedView,
    RestoredView,
    RevisionView,
    SnapshotView,
    StatusView,
    TraceView,
    UnreadableView,
)
from torpor.units import Digest

T = TypeVar("T")


class AsyncClient:
    """A node's daemon. Belongs to one asyncio loop; see `node.service.Service`.

    `address` is the path of its Unix socket, or http://HOST:PORT with the `token`; without one the
    socket that the settings name. `reporter` is told how long operations get on. Every method
    raises the TorporError that the daemon answered, and HostUnfit when there is no daemon.
    """

    def __init__(
        self,
        address: str | Path | None = None,
        *,
        token: str | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self._where = Where.find(address, token)
        self._reporter = reporter or Silent()
        socket = self._where.socket
        self._http = httpx.AsyncClient(
            transport=None if socket is None else httpx.AsyncHTTPTransport(uds=str(socket)),
            base_url=self._where.url,
            headers=self._where.headers(),
            timeout=httpx.Timeout(None, connect=5.0),
            trust_env=False,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def status(self) -> StatusView:
        """What the daemon is."""
        return await self._ask(calls.status())

    async def functions(self) -> list[FunctionView]:
        """The functions of the node."""
        return await self._ask(calls.functions())

    async def revisions(self, name: str) -> list[RevisionView]:
        """The revisions of a function that are on the node, latest first."""
        return await self._ask(calls.revisions(name))

    async def instances(self) -> list[InstanceView]:
        """The instances of the node; what is dead was removed first."""
        return await self._ask(calls.instances())

    async def snapshots(self) -> list[SnapshotView]:
        """The snapshots of the node, bases too."""
        return await self._ask(calls.snapshots())

    async def unreadable(self) -> list[UnreadableView]:
        """The snapshots of the node that cannot be read, and why."""
        return await self._ask(calls.unreadable())

    async def traces(self) -> list[TraceView]:
        """The wakes that the daemon remembers."""
        return await self._ask(calls.traces())

    async def deploy(self, directory: Path, *, name: str | None = None) -> DeployedView:
        """Deploy the function of a directory of the daemon's host; only over its socket."""
        return await self._work(calls.deploy(directory, name=name))

    async def invoke(
        self, name: str, request: Request, *, keep: bool = False, trace: bool = False
    ) -> InvokedView:
        """Send one request to a function, waking it if it sleeps."""
        return await self._work(calls.invoke(name, request, keep=keep, trace=trace))

    async def restore(
        self, reference: str, *, expect: Digest | None = None, trace: bool = False
    ) -> RestoredView:
        """Wake a snapshot or function and leave the instance running."""
        return await self._work(calls.restore(reference, expect=expect, trace=trace))

    async def fork(self, instance_id: str, *, count: int = 1) -> ForkedView:
        """Make clones of a running instance, which stands still for one pause."""
        return await self._work(calls.fork(instance_id, count=count))

    async def create_snapshot(
        self, instance_id: str, *, name: str | None = None, trial: bool = False
    ) -> CapturedView:
        """Snapshot a running instance, which runs on."""
        return await self._work(calls.create_snapshot(instance_id, name=name, trial=trial))

    async def recent_events(self, *, after: int = 0) -> list[Event]:
        """What is remembered of what happened after that event."""
        return await self._ask(calls.recent_events(after=after))

    async def remove_function(self, name: str) -> RemovedView:
        """Delete a function; its instances are stopped."""
        return await self._ask(calls.remove_function(name))

    async def stop(self, instance_ids: Sequence[str]) -> list[str]:
        """End instances, all of them or none; their whole ids."""
        return list((await self._ask(calls.stop(instance_ids))).stopped)

    async def logs(self, instance_id: str, *, lines: int = 1000) -> LogsView:
        """What an instance's console printed."""
        return await self._ask(calls.logs(instance_id, lines=lines))

    async def follow_logs(self, instance_id: str, *, lines: int = 1000) -> AsyncIterator[str]:
        """Its last lines and each one that it prints, until the instance ends."""
        call = calls.logs(instance_id, lines=lines, follow=True)
        async for line in self._lines(request_of(call)):
            yield msgspec.json.decode(line, type=str)

    async def remove_snapshot(self, reference: str) -> str:
        """Delete a snapshot; its digest."""
        return (await self._ask(calls.remove_snapshot(reference))).snapshot

    async def events(self, *, after: int | None = None) -> AsyncIterator[Event]:
        """What happens from now on; with `after` first what is remembered since that event."""
        query = {} if after is None else {"after": after}
        async for line in self._lines(request_of(Call("GET", "/v1/events", Event, query=query))):
            event = event_of(line)
            if event is not None:
                yield event

    async def _ask(self, call: Call[T]) -> T:
        try:
            answer = await self._http.request(**request_of(call))
        except httpx.TransportError as error:
            raise self._where.unreachable(error) from None
        refuse_problem(answer.status_code, answer.content)
        return decode(call, answer.content)

    async def _work(self, call: Call[T]) -> T:
        """An operation with progress; leaving it early cancels it on the node."""
        lines = Lines(self._reporter)
        async with contextlib.aclosing(self._lines(request_of(call, lines=True))) as answered:
            async for line in answered:
                lines.take(line)
        return lines.result(call)

    async def _lines(self, asked: dict[str, object]) -> AsyncGenerator[str, None]:
        self._where.check()
        try:
            async with self._http.stream(**asked) as answer:  # type: ignore[arg-type]
                if answer.status_code >= 400:
                    refuse_problem(answer.status_code, await answer.aread())
                splitter = LineSplitter()
                async for data in answer.aiter_bytes():
                    for line in splitter.feed(data):
                        yield line
        except httpx.TransportError as error:
            raise self._where.unreachable(error) from None
