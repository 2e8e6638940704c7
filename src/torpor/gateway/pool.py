"""The instances of one function, the requests that wait for one, and how many more are wanted.

Pure bookkeeping on one asyncio loop: it wakes and stops nothing itself, see Scaler.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torpor.errors import NotFound, Overloaded
from torpor.gateway.stats import FunctionStats, Histogram

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.gateway.fleet import Deployed, Ready
    from torpor.gateway.upstream import FunctionConnection
    from torpor.snapshot.manifest import Scale


@dataclass(eq=False)
class Member:
    """One instance. `retired`: it gets no more requests and ends after its last one.

    `failed`: it refused a connection. `served` counts requests since this gateway knows it.
    """

    ready: Ready
    added_at: float
    idle_since: float
    in_flight: int = 0
    served: int = 0
    retired: bool = False
    failed: bool = False
    idle: list[FunctionConnection] = field(default_factory=list)
    active: set[FunctionConnection] = field(default_factory=set)

    def close_idle(self) -> None:
        """Close the connections that are kept for later requests."""
        while self.idle:
            self.idle.pop().close()


class Pool:
    """One function in this gateway. Belongs to the loop; `clock` is the loop's."""

    def __init__(
        self,
        name: str,
        deployed: Deployed,
        *,
        want: Callable[[Pool], None],
        clock: Callable[[], float],
    ) -> None:
        """`want` is called when requests wait that could use another instance."""
        self.name = name
        self.deployed = deployed
        self.members: dict[str, Member] = {}
        self.waking = 0
        self.stopping: set[str] = set()
        self.last_failure_at = 0.0
        self.failures = 0
        self.wakes: Counter[str] = Counter()
        self.responses: Counter[str] = Counter()
        self.stopped = self.refreshed = 0
        self.wait, self.duration = Histogram(), Histogram()
        self._waiting: deque[asyncio.Future[Member]] = deque()
        self._want = want
        self._clock = clock

    @property
    def scale(self) -> Scale:
        """Its limits as they are now."""
        return self.deployed.scale

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def serving(self) -> list[Member]:
        """The instances that get requests."""
        return [member for member in self.members.values() if not member.retired]

    def take(self) -> Member | None:
        """The least loaded instance with room, now with one request more; None if there is none.

        Requests that wait come first.
        """
        best: Member | None = None
        if self._waiting:
            return None
        for member in self.members.values():
            if not member.retired and (best is None or member.in_flight < best.in_flight):
                best = member
        if best is None or best.in_flight >= self.scale.concurrency:
            return None
        best.in_flight += 1
        return best

    async def acquire(self) -> Member:
        """As `take`, but wait for one. Raises Overloaded, or why no instance could be woken."""
        member = self.take()
        if member is not None:
            return member
        if len(self._waiting) >= max(self.scale.queue, 0):
            raise Overloaded(
                f"{self.name} is full: {len(self._waiting)} requests wait for an instance already"
            )
        future: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._want(self)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(future.result())  # it was handed over at the very moment
            raise
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def release(self, member: Member) -> None:
        """A request is over."""
        member.in_flight -= 1
        member.served += 1
        if not member.in_flight:
            member.idle_since = self._clock()
        self.hand_over()

    def hand_over(self) -> None:
        """Give what has room to the requests that wait longest."""
        while self._waiting:
            members = [m for m in self.serving() if m.in_flight < self.scale.concurrency]
            if not members:
                break
            future = self._waiting.popleft()
            if not future.done():
                best = min(members, key=lambda member: member.in_flight)
                best.in_flight += 1
                future.set_result(best)

    def add(self, ready: Ready) -> Member:
        """An instance is there, newly woken or found; known ones stay as they are."""
        member = self.members.get(ready.id)
        if member is None:
            now = self._clock()
            member = self.members[ready.id] = Member(ready, now, now)
            self._retire_outdated()
        self.hand_over()
        return member

    def remove(self, instance_id: str) -> None:
        """An instance is gone; requests that it has fail now: a dead VM closes no connection."""
        member = self.members.pop(instance_id, None)
        if member is not None:
            member.retired = True
            member.close_idle()
            for connection in list(member.active):
                connection.give_up("the instance is gone")
        self._wanted_again()

    def update(self, deployed: Deployed) -> None:
        """The function as it is deployed now; instances of older revisions retire."""
        self.deployed = deployed
        self._retire_outdated()
        self.hand_over()
        self._wanted_again()

    def fail(self, error: Exception) -> None:
        """Tell all that wait."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)

    def forget(self) -> None:
        """The function is not deployed any more."""
        for member in self.members.values():
            member.retired = True
        self.fail(NotFound(f"there is no function {self.name!r} any more"))

    def missing(self) -> int:
        """How many more wakes to begin now: for what waits, and for `min`."""
        current = len(self.serving()) + self.waking
        # one that refused connections holds no place; one that falls asleep does until it is gone
        leaving = sum(
            1
            for member in self.members.values()
            if member.retired and not member.failed and self._is_current(member)
        )
        each = self.scale.concurrency
        for_waiting = -(-len(self._waiting) // each) - self.waking
        wanted = max(for_waiting, self.scale.min - current)
        return max(min(wanted, self.scale.max - current - leaving), 0)

    def sleepy(self) -> list[Member]:
        """Instances beyond `min` that have been idle for long enough, the longest first."""
        serving = self.serving()
        latest = self._clock() - self.scale.idle_ms / 1000
        idle = [m for m in serving if not m.in_flight and m.idle_since <= latest]
        idle.sort(key=lambda member: member.idle_since)
        return idle[: max(len(serving) - self.scale.min, 0)]

    def refreshes(self, member: Member) -> bool:
        """Whether the function's snapshot is to be replaced by this instance's before it ends.

        Only the last instance of a function may: what it holds is then all there is.
        """
        alone = len(self.members) == 1 and not self.waking
        if not (alone and member.served and self._is_current(member)) or member.failed:
            return False
        match self.scale.snapshot:
            case "on-idle":
                return True
            case "on-deploy":
                return self.deployed.refreshed == 0
            case _:
                return False

    def stats(self) -> FunctionStats:
        """See FunctionStats."""
        return FunctionStats(
            name=self.name,
            queued=len(self._waiting),
            in_flight=sum(member.in_flight for member in self.members.values()),
            instances=len(self.members),
            waking=self.waking,
            stopped=self.stopped,
            refreshed=self.refreshed,
            wakes=dict(self.wakes),
            responses=dict(self.responses),
            wait=self.wait,
            duration=self.duration,
        )

    def _is_current(self, member: Member) -> bool:
        return self.deployed.snapshot in ("", member.ready.snapshot)

    def _retire_outdated(self) -> None:
        for member in self.members.values():
            if not self._is_current(member):
                member.retired = True

    def _wanted_again(self) -> None:
        if self._waiting:
            self._want(self)
