"""One node's daemon: the API, the gateway, the uploads, and the watch over what dies.

It owns nothing that must outlive it: VMs run on when it ends or is killed, the next one takes them
over, and what was to be uploaded is in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from opentelemetry.trace import Tracer

from torpor.api.app import create_app
from torpor.api.guard import Guard
from torpor.api.idempotency import Once
from torpor.api.metrics import GatewayCounts, Metrics
from torpor.api.server import Listener, listen_tcp, listen_unix
from torpor.api.state import State
from torpor.config import Settings
from torpor.errors import Conflict, InvalidInput, TorporError
from torpor.host.cancel import in_thread
from torpor.host.lock import exclusive
from torpor.host.process import reap_spawned
from torpor.host.space import is_full
from torpor.node.collect import collect
from torpor.node.events import Event
from torpor.node.journal_rows import InstanceRow
from torpor.node.node import Node
from torpor.node.reconcile import reconcile
from torpor.node.stalls import LITTLE_BYTES, Suspects, revive
from torpor.node.uploads import Uploader
from torpor.vmm.interface import finish

log = logging.getLogger("torpor.daemon")

_WATCH_S: Final = 2.0
_THREADS: Final = 64
"""For blocking work: what waits for a store that is silent must not keep the rest from its turn."""


class Invocations(Protocol):
    """The gateway, as the daemon uses it."""

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""

    async def start(self, *, host: str, port: int) -> None:
        """Listen from now on."""

    async def drain(self, *, deadline_s: float) -> None:
        """Let requests end, then stop. Idempotent."""

    def stats(self) -> GatewayCounts:
        """What it counted."""


class Daemon:
    """A node that stays. Belongs to one asyncio loop."""

    def __init__(
        self, node: Node, gateway: Invocations | None, tracer: Tracer | None = None
    ) -> None:
        self._node, self._gateway = node, gateway
        self._settings = node.parts.settings
        once = Once(node.parts.journal)
        self.state = State(node, once, gateway=self._gateway_address, tracer=tracer)
        self._metrics = Metrics(node, lambda: None if gateway is None else gateway.stats())
        self._listeners: list[Listener] = []
        self._background: list[asyncio.Task[None]] = []
        self._hurried = asyncio.Event()
        self._drained = False
        self._was_full = True  # perhaps, while no daemon was here
        self._suspects = Suspects()
        self._collects = False

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        settings: Settings,
        make_gateway: Callable[[Node], Invocations | None],
        *,
        tracer: Tracer | None = None,
    ) -> AsyncIterator[Daemon]:
        """A daemon that serves during the body; `drain` it before the body ends.

        What dead commands and daemons left is undone first; VMs that run are taken over. Raises
        Conflict when another daemon has this home, InvalidInput, HostUnfit.
        """
        if settings.api_listen and not settings.api_token:
            raise InvalidInput(
                "the API does not listen on TCP without a token",
                hint="set api_token (TORPOR_API_TOKEN), or leave api_listen empty",
            )
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "work"))
        async with Node.open(settings) as node:
            with contextlib.ExitStack() as stack:
                try:
                    path = node.parts.locks_dir / "daemon"
                    stack.enter_context(exclusive(path, timeout_s=0, what="this home"))
                except Conflict as error:
                    raise Conflict(
                        f"another daemon has the home {settings.home}", reason=error.reason
                    ) from None
                daemon = cls(node, make_gateway(node), tracer)
                stack.enter_context(node.parts.events.heard(daemon._hear))
                try:
                    await daemon._start()
                    yield daemon
                finally:
                    daemon.hurry()
                    await finish(daemon.drain())

    async def drain(self) -> None:
        """End in order: requests first, then uploads, then as the setting `drain` says.

        Idempotent. After `hurry` nothing is waited for, and instances are left as they are.
        """
        if self._drained:
            return
        self.state.closing.set()
        if self._gateway is not None:
            deadline_s = self._settings.drain_s
            await self._unless_hurried(self._gateway.drain(deadline_s=deadline_s))
            if self._hurried.is_set():
                await self._gateway.drain(deadline_s=0)
        await asyncio.gather(*(listener.stop() for listener in self._listeners))
        for task in self._background:
            task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        if self._settings.drain == "snapshot":
            await self._unless_hurried(self._put_all_to_sleep())
        if self._listeners:
            self._settings.socket_path().unlink(missing_ok=True)
        self._drained = True

    def hurry(self) -> None:
        """Have `drain` come to its end at once."""
        self._hurried.set()
        for listener in self._listeners:
            listener.hurry()

    @property
    def addresses(self) -> list[str]:
        """Where the API listens."""
        return [listener.address for listener in self._listeners]

    async def _start(self) -> None:
        settings = self._settings
        if self._gateway is not None:
            host, _, port = settings.gateway_listen.rpartition(":")
            try:
                await self._gateway.start(host=host.strip("[]"), port=int(port))
            except BaseException:
                self._gateway = None
                raise
        app = create_app(self.state, self._metrics)
        if settings.api_listen:
            self._add(Guard(app, token=settings.api_token), listen_tcp(settings.api_listen))
        path = settings.socket_path()
        self._add(Guard(app, token=None), listen_unix(path), path)
        for listener in self._listeners:
            await listener.start()
        for work in (Uploader(self._node).run(), self._watch()):
            self._background.append(asyncio.ensure_future(work))

    def _add(self, app: Guard, listening: socket.socket, path: Path | None = None) -> None:
        drain_s, head_s = self._settings.drain_s, self._settings.gateway_header_timeout_s
        self._listeners.append(Listener(app, listening, drain_s=drain_s, head_s=head_s, path=path))

    async def _watch(self) -> None:
        """Remove what died; what cannot be looked at now is looked at again."""
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                await self._look_after()
            except TorporError as error:
                log.error("the node could not be looked after error=%s", error)
            except Exception:  # ours: what dies from now on must go all the same
                log.exception("the node could not be looked after")
            await in_thread(reap_spawned)

    async def _look_after(self) -> None:
        node, home = self._node, self._settings.home
        await in_thread(node.paging.clear_dead)
        await reconcile(node.parts, node.instances, node.paging)
        if not is_full(home):
            only = self._suspects.find(await in_thread(node.parts.journal.instances))
            unasked = await revive(
                node.parts, node.instances, only=None if self._was_full else only
            )
            self._suspects.forget(unasked)
            self._was_full = bool(unasked) and self._was_full
        self._was_full |= is_full(home, below_bytes=LITTLE_BYTES)
        if self._collects:  # a snapshot that only those instances needed that are gone
            self._collects = False
            if await collect(node.parts) is None:
                self._collects = True

    def _hear(self, event: Event) -> None:
        self._metrics.hear(event)
        if event.kind == "instance.removed":
            self._collects = True

    async def _put_all_to_sleep(self) -> None:
        for row in await in_thread(self._node.parts.journal.instances):
            if row.state == "running" and row.keeper is None and row.snapshot:
                try:
                    await self._put_to_sleep(row)
                except TorporError as error:  # what it holds may not be lost
                    log.error("instance is left running id=%s error=%s", row.id, error)

    async def _put_to_sleep(self, row: InstanceRow) -> None:
        captured = await self._node.create_snapshot(row.id)
        await self._node.stop(row.id)
        log.info("asleep id=%s snapshot=%s", row.id, captured.snapshot.digest[:12])

    async def _unless_hurried(self, work: Awaitable[None]) -> None:
        """Wait for the work, or cancel it when there is no more time for it."""
        task = asyncio.ensure_future(work)
        hurried = asyncio.ensure_future(self._hurried.wait())
        try:
            await asyncio.wait({task, hurried}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurried.cancel()
            task.cancel()
            await asyncio.wait({task, hurried})
        if not task.cancelled():
            task.result()

    def _gateway_address(self) -> str:
        if self._gateway is None:
            return ""
        host, port = self._gateway.address
        return f"http://{host}:{port}"
