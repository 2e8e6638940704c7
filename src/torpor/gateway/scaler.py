"""Wakes and stops instances: on demand, by idle time, and as the node's state changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from torpor.errors import NotFound, TorporError
from torpor.gateway.fleet import Deployed
from torpor.gateway.pool import Pool
from torpor.gateway.spans import Spans
from torpor.gateway.stats import WakeRecord
from torpor.node.spans import failed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from opentelemetry.trace import Span

    from torpor.gateway.fleet import Fleet, View
    from torpor.gateway.pool import Member

log = logging.getLogger("torpor.gateway")

_TICK_S: Final = 0.2
_UNKNOWN_S: Final = 1.0
_MOST_UNKNOWN: Final = 1000
_ASKS_AT_ONCE: Final = 8
_BACKOFF_S: Final = (1.0, 60.0)


class Scaler:
    """The pools of all functions. Belongs to one asyncio loop."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        wakes_at_once: int,
        spans: Spans | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.pools: dict[str, Pool] = {}
        self.recent_wakes: deque[WakeRecord] = deque(maxlen=1024)
        self._fleet = fleet
        self._spans = spans or Spans(None)
        self._clock = clock or asyncio.get_running_loop().time
        self._wake_slots = asyncio.Semaphore(wakes_at_once)
        self._fetch_slots = asyncio.Semaphore(wakes_at_once)  # what waits for a store is in no way
        self._ask_slots = asyncio.Semaphore(_ASKS_AT_ONCE)
        self._asking: dict[str, asyncio.Task[bool]] = {}
        self._looking = asyncio.Lock()
        self._gone_at: dict[str, float] = {}
        self._unknown: dict[str, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._draining = False

    async def find(self, name: str) -> Pool:
        """The pool of a function, on this node or in the store. Raises NotFound, StoreError."""
        pool = self.pools.get(name)
        if pool is not None:
            return pool
        if self._unknown.get(name, 0.0) > self._clock():
            raise _unknown(name)
        await self.look()
        if name in self.pools:
            return self.pools[name]
        if not await self._find_elsewhere(name):
            if len(self._unknown) >= _MOST_UNKNOWN:
                self._unknown.clear()
            self._unknown[name] = self._clock() + _UNKNOWN_S
            raise _unknown(name)
        return self._pool(name, Deployed())

    async def _find_elsewhere(self, name: str) -> bool:
        """Ask once for all that want to know it now; who stops waiting does so at once."""
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.ensure_future(self._ask(name))
            self._tasks.add(asking)
            asking.add_done_callback(self._tasks.discard)
            asking.add_done_callback(lambda asked: self._asked(name, asked))
        return await asyncio.shield(asking)

    async def _ask(self, name: str) -> bool:
        async with self._ask_slots:
            return await self._fleet.find_elsewhere(name)

    def _asked(self, name: str, asking: asyncio.Task[bool]) -> None:
        del self._asking[name]
        if not asking.cancelled():
            asking.exception()  # perhaps nobody waits for it any more

    async def look(self) -> None:
        """Take over what is on the node now. Raises what the fleet's view raises."""
        async with self._looking:
            began = self._clock()
            self._apply(await self._fleet.view(), began)

    async def run(self) -> None:
        """Look and scale until cancelled."""
        while True:
            try:
                if self._fleet.changed():
                    await self.look()
            except TorporError as error:
                log.error("the node was not looked at error=%s", error)
            self.tick()
            await asyncio.sleep(_TICK_S)

    def tick(self) -> None:
        """Begin what is due: ends of idle and retired instances, wakes for `min`."""
        if self._draining:
            return
        for pool in list(self.pools.values()):
            for member in pool.sleepy():
                member.retired = True
            for member in list(pool.members.values()):
                if member.retired and not member.in_flight:
                    self._begin_stop(pool, member)
            if not pool.failures or self._clock() >= pool.last_failure_at + _backoff(pool):
                self._want(pool)

    def suspect(self, pool: Pool, member: Member) -> None:
        """An instance refused a connection: it ends, another takes its place."""
        log.warning("instance refuses connections id=%s", member.ready.id)
        member.retired = member.failed = True
        member.close_idle()

    async def drain(self) -> None:
        """Begin no more wakes and stops; return when those under way are over."""
        self._draining = True
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def cancel(self) -> None:
        """Break off what is under way."""
        for task in self._tasks:
            task.cancel()

    def _pool(self, name: str, deployed: Deployed) -> Pool:
        if name not in self.pools:
            self.pools[name] = Pool(name, deployed, want=self._want, clock=self._clock)
        return self.pools[name]

    def _want(self, pool: Pool) -> None:
        if self._draining:
            return
        for _ in range(pool.missing()):
            pool.waking += 1
            self._spawn(self._wake(pool))

    async def _wake(self, pool: Pool) -> None:
        if await self._is_needless(pool):
            return
        with self._spans.wake(pool.name, asyncio.get_running_loop().time()) as span:
            await self._wake_traced(pool, span)

    async def _is_needless(self, pool: Pool) -> bool:
        """Whether the API or a command has woken since the last look what a wake is for.

        That wake then counts no more.
        """
        if not self._fleet.changed():
            return False
        try:
            with contextlib.suppress(TorporError):  # the wake will tell
                await self.look()
        except BaseException:
            pool.waking -= 1
            raise
        pool.waking -= 1
        if not pool.missing():
            return True
        pool.waking += 1
        return False

    async def _wake_traced(self, pool: Pool, span: Span | None) -> None:
        queued_at = self._clock()
        error: TorporError | None = None
        began = queued_at
        try:
            async with self._wake_slots if pool.deployed.here else self._fetch_slots:
                began = self._clock()
                woken = await self._fleet.wake(pool.name)
            self._spans.woke(span, woken)
            if woken.ready.snapshot != pool.deployed.snapshot:  # fetched, or deployed meanwhile
                await self.look()
        except TorporError as caught:
            error = caught
        finally:
            pool.waking -= 1
        how = "failed" if error is not None else woken.how
        now = self._clock()
        self.recent_wakes.append(WakeRecord(pool.name, how, began - queued_at, now - began))
        pool.wakes[how] += 1
        if error is None:
            pool.failures = 0
            pool.add(woken.ready)
            return
        failed(span, error)
        log.error("wake failed function=%s error=%s", pool.name, error)
        pool.failures, pool.last_failure_at = pool.failures + 1, now
        if not pool.waking and not pool.serving():
            pool.fail(error)

    def _begin_stop(self, pool: Pool, member: Member) -> None:
        if member.ready.id not in pool.stopping:
            pool.stopping.add(member.ready.id)
            self._spawn(self._stop(pool, member))

    async def _stop(self, pool: Pool, member: Member) -> None:
        instance_id = member.ready.id
        member.close_idle()
        try:
            if pool.refreshes(member):
                await self._fleet.refresh(instance_id)
                pool.refreshed += 1
            await self._fleet.stop(instance_id)
        except TorporError as error:
            # it lives on: what it holds may not be lost; the next idle time tries again
            log.error("instance does not fall asleep id=%s error=%s", instance_id, error)
            member.retired, member.idle_since = member.failed, self._clock()
            pool.hand_over()
        else:
            pool.stopped += 1
            self._gone_at[instance_id] = self._clock()
            with contextlib.suppress(TorporError):  # the next tick looks again
                await self.look()
            pool.remove(instance_id)
        finally:
            pool.stopping.discard(instance_id)

    def _apply(self, view: View, began: float) -> None:
        self._gone_at = {i: at for i, at in self._gone_at.items() if at >= began}
        for name, deployed in view.functions.items():
            self._pool(name, deployed).update(deployed)
        for name, pool in list(self.pools.items()):
            if name not in view.functions and (pool.deployed.snapshot or not pool.waking):
                if pool.deployed.snapshot:
                    pool.forget()
                    del self.pools[name]
                elif not pool.waiting and not pool.members:
                    del self.pools[name]  # it was only in the store, and nobody wants it any more
        here = {ready.id for ready in view.instances}
        for pool in self.pools.values():
            for member in list(pool.members.values()):
                if member.ready.id not in here and member.added_at < began:
                    pool.remove(member.ready.id)
        for ready in view.instances:
            if ready.id not in self._gone_at and ready.function in self.pools:
                self.pools[ready.function].add(ready)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _backoff(pool: Pool) -> float:
    least, most = _BACKOFF_S
    return min(least * 2.0 ** min(pool.failures - 1, 10), most)


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no function {name!r}", hint="`torpor ls` lists them")
