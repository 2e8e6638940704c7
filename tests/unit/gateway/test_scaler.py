"""Waiting, waking and stopping, with a clock of the test's own and no network."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from fixtures.gateways import TestFleet, wait_for
from torpor.errors import NotFound, Overloaded, VmmFailed
from torpor.gateway.fleet import Ready
from torpor.gateway.scaler import Scaler
from torpor.snapshot.manifest import Scale

if TYPE_CHECKING:
    from torpor.gateway.pool import Member, Pool


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


class World:
    """A fleet with one function `f`, and a scaler."""

    def __init__(self, scale: Scale, *, wakes_at_once: int = 2) -> None:
        self.clock = Clock()
        self.fleet = TestFleet()
        self.fleet.deploy("f", 1, scale)
        self.scaler = Scaler(self.fleet, wakes_at_once=wakes_at_once, clock=self.clock)

    async def pool(self) -> Pool:
        """The pool of `f`."""
        return await self.scaler.find("f")

    async def take(self, count: int) -> list[Member]:
        """So many requests that got their instance."""
        pool = await self.pool()
        return list(await asyncio.gather(*(pool.acquire() for _ in range(count))))

    async def settle(self) -> None:
        """Let what is under way come to its end."""
        await wait_for(lambda: not self.scaler._tasks)

    async def later(self, seconds: float) -> None:
        """So much later, after a look and a tick."""
        self.clock.now += seconds
        await self.scaler.look()
        self.scaler.tick()
        await self.settle()


async def test_requests_share_one_wake() -> None:
    """As many as an instance takes wait for one wake, whose instance gets them all."""
    world = World(Scale(concurrency=10))
    members = await world.take(10)
    assert world.fleet.began == ["f"]
    assert len({member.ready.id for member in members}) == 1


async def test_instances_that_others_have_just_woken() -> None:
    """What was woken by the API or a command since the last look gets the request: no wake.

    Requests beyond what it takes wake as many as they need.
    """
    world = World(Scale(concurrency=2))
    pool = await world.pool()
    world.fleet.instances["other"] = Ready("other", "f", "one", "127.0.0.1", 1)
    members = await world.take(2)
    assert {member.ready.id for member in members} == {"other"}
    await world.settle()
    assert (world.fleet.began, pool.waking) == ([], 0)
    world.fleet.instances["another"] = Ready("another", "f", "one", "127.0.0.1", 1)
    members += await world.take(4)
    assert {member.ready.id for member in members} == {"other", "another", "f-1"}
    await world.settle()
    assert (world.fleet.began, pool.waking) == (["f"], 0)


async def test_more_instances_as_concurrency_needs_up_to_max() -> None:
    """Eleven requests by four each want three instances; a limit of two lets the rest wait."""
    world = World(Scale(concurrency=4, max=3))
    assert len({m.ready.id for m in await world.take(11)}) == 3
    world = World(Scale(concurrency=4, max=2))
    pool = await world.pool()
    waiting = [asyncio.ensure_future(pool.acquire()) for _ in range(11)]
    await wait_for(lambda: sum(task.done() for task in waiting) == 8)
    assert (len(world.fleet.began), pool.waiting) == (2, 3)
    for task in waiting[:3]:
        pool.release(task.result())
    await asyncio.gather(*waiting)
    assert len(world.fleet.began) == 2


async def test_least_load() -> None:
    """A request goes to the instance that has the fewest."""
    world = World(Scale(concurrency=2, max=2))
    members = await world.take(4)
    pool = await world.pool()
    chosen = members[2]
    pool.release(chosen)
    assert pool.take() is chosen
    assert pool.take() is None


async def test_full_queue() -> None:
    """More than may wait are told at once; those that wait are not disturbed."""
    world = World(Scale(concurrency=1, max=1, queue=2))
    world.fleet.gate = asyncio.Event()
    pool = await world.pool()
    waiting = [asyncio.ensure_future(pool.acquire()) for _ in range(2)]
    await wait_for(lambda: pool.waiting == 2)
    with pytest.raises(Overloaded, match="f is full"):
        await pool.acquire()
    world.fleet.gate.set()
    pool.release(await waiting[0])
    pool.release(await waiting[1])


async def test_requests_that_leave_take_nothing() -> None:
    """A request that is cancelled while it waits, or just as it is served, holds no place."""
    world = World(Scale(concurrency=1, max=1))
    (member,) = await world.take(1)
    pool = await world.pool()
    left = asyncio.ensure_future(pool.acquire())
    handed = asyncio.ensure_future(pool.acquire())
    await wait_for(lambda: pool.waiting == 2)
    left.cancel()
    await asyncio.wait((left,))
    pool.release(member)
    handed.cancel()  # its future has the instance, its task has not run yet
    await asyncio.wait((handed,))
    assert handed.cancelled()
    assert (member.in_flight, pool.waiting) == (0, 0)


async def test_wakes_at_once_are_bounded() -> None:
    """However many functions are asked for, so many wake at a time; all are woken in order."""
    world = World(Scale(), wakes_at_once=2)
    names = [f"f{number}" for number in range(10)]
    for name in names:
        world.fleet.deploy(name, 1, Scale())
    pools = [await world.scaler.find(name) for name in names]
    await asyncio.gather(*(pool.acquire() for pool in pools))
    assert world.fleet.began == names
    assert world.fleet.most_at_once == 2
    assert [record.function for record in world.scaler.recent_wakes] == names


async def test_what_waits_for_the_store_is_in_nobodys_way() -> None:
    """Such wakes take no places of others; who asks for the same unknown function asks once.

    Who stops waiting for the store's word does so at once.
    """
    world = World(Scale(), wakes_at_once=1)
    world.fleet.gate = gate = asyncio.Event()
    for name in ("far", "farther"):
        world.fleet.deploy(name, 1, Scale(), here=False)
    asked: list[str] = []

    async def wait_for_store(name: str) -> bool:
        asked.append(name)
        await gate.wait()
        return False

    world.fleet.find_elsewhere = wait_for_store  # type: ignore[method-assign]
    pools = [await world.scaler.find(name) for name in ("far", "farther", "f")]
    waking = [asyncio.ensure_future(pool.acquire()) for pool in pools]
    await wait_for(lambda: world.fleet.began == ["far", "f"])
    finding = [asyncio.ensure_future(world.scaler.find("nothing")) for _ in range(3)]
    await wait_for(lambda: asked)
    finding[0].cancel()
    await asyncio.wait(finding[:1])
    gate.set()
    for found in finding[1:]:
        with pytest.raises(NotFound):
            await found
    await asyncio.gather(*waking)
    assert asked == ["nothing"]


async def test_failed_wake_is_told_to_all_that_wait() -> None:
    """They get the error; the next request wakes again."""
    world = World(Scale(concurrency=4))
    world.fleet.errors = [VmmFailed("no such machine")]
    pool = await world.pool()
    results = await asyncio.gather(*(pool.acquire() for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [VmmFailed] * 3
    await pool.acquire()
    assert pool.stats().wakes == {"failed": 1, "local": 1}


async def test_idle_instances_end_but_for_min() -> None:
    """Beyond `min`, after the idle time since the last request and not before."""
    world = World(Scale(concurrency=1, min=1, max=3, idle_ms=10_000))
    members = await world.take(3)
    pool = await world.pool()
    for member in members:
        world.clock.now += 1
        pool.release(member)
    await world.later(7.5)
    assert world.fleet.stopped == []
    await world.later(1)
    assert world.fleet.stopped == [members[0].ready.id]
    await world.later(100)
    assert world.fleet.stopped == [member.ready.id for member in members[:2]]
    assert [member.ready.id for member in pool.serving()] == [members[2].ready.id]


async def test_min_instances_are_kept_awake() -> None:
    """Without any request, and again after one died; a wake that fails is repeated ever rarer."""
    world = World(Scale(min=2))
    await world.later(0)
    assert len(world.fleet.began) == 2
    world.fleet.instances.popitem()
    await world.later(1)
    assert len(world.fleet.began) == 3
    world.fleet.errors = [VmmFailed("no")] * 2
    world.fleet.instances.popitem()
    await world.later(1)
    await world.later(0.5)
    assert len(world.fleet.began) == 4
    await world.later(0.6)
    await world.later(1.5)
    assert len(world.fleet.began) == 5
    await world.later(1)
    assert (len(world.fleet.began), len(world.fleet.instances)) == (6, 2)


async def test_new_revision_takes_over() -> None:
    """Instances of the old one finish what they have and end; new requests wake the new one."""
    world = World(Scale(concurrency=4, max=1))
    (old,) = await world.take(1)
    world.fleet.deploy("f", 2, Scale(concurrency=4, max=1), snapshot="two")
    await world.later(1)
    (new,) = await world.take(1)
    assert (old.ready.snapshot, new.ready.snapshot) == ("one", "two")
    assert world.fleet.stopped == []
    (await world.pool()).release(old)
    await world.later(1)
    assert world.fleet.stopped == [old.ready.id]


async def test_revision_that_is_deployed_during_a_wake() -> None:
    """What was woken is of the new one, and serves although the last look was before it."""
    world = World(Scale())
    await world.pool()
    world.fleet.deploy("f", 2, Scale(), snapshot="two")
    (member,) = await world.take(1)
    assert (member.ready.snapshot, member.retired) == ("two", False)


async def test_instances_that_are_there_are_used() -> None:
    """After a restart, and those that others woke: no wake, and they end by idle time."""
    world = World(Scale(idle_ms=1000))
    world.fleet.instances["x"] = Ready("x", "f", "one", "127.0.0.1", 1)
    (member,) = await world.take(1)
    assert (member.ready.id, world.fleet.began) == ("x", [])
    (await world.pool()).release(member)
    await world.later(2)
    assert world.fleet.stopped == ["x"]


async def test_instances_that_others_stopped_are_forgotten() -> None:
    """The next request wakes another one."""
    world = World(Scale())
    (member,) = await world.take(1)
    (await world.pool()).release(member)
    world.fleet.instances.clear()
    await world.later(1)
    assert (await world.take(1))[0] is not member
    assert len(world.fleet.began) == 2


async def test_removed_functions_are_unknown() -> None:
    """Requests that wait for it are told; for a moment nobody asks the store again."""
    world = World(Scale())
    world.fleet.gate = asyncio.Event()
    pool = await world.pool()
    waiting = asyncio.ensure_future(pool.acquire())
    await wait_for(lambda: pool.waiting)
    world.fleet.functions.clear()
    await world.scaler.look()
    with pytest.raises(NotFound):
        await waiting
    world.fleet.gate.set()
    await world.settle()
    with pytest.raises(NotFound):
        await world.pool()
    world.fleet.deploy("f", 1, Scale())
    with pytest.raises(NotFound):
        await world.pool()
    await world.later(0)
    await world.pool()


async def test_functions_that_only_the_store_has() -> None:
    """They are woken by name; from then on they are like any other."""
    world = World(Scale())
    world.fleet.stored.add("g")
    pool = await world.scaler.find("g")
    world.fleet.deploy("g", 7, Scale(concurrency=2), snapshot="far")
    member = await pool.acquire()
    assert member.ready.snapshot == "far"
    assert pool.scale.concurrency == 2


@pytest.mark.parametrize(("policy", "expected"), [("never", 0), ("on-deploy", 1), ("on-idle", 2)])
async def test_snapshot_policies(policy: str, expected: int) -> None:
    """Never, once after a deploy, or at each falling asleep; not of one that served nothing."""
    world = World(Scale(idle_ms=1000, snapshot=policy))  # type: ignore[arg-type]
    world.fleet.instances["x"] = Ready("x", "f", "one", "127.0.0.1", 1)
    await world.later(0)
    await world.later(2)
    assert (world.fleet.stopped, world.fleet.refreshed) == (["x"], [])
    for _ in range(2):
        (member,) = await world.take(1)
        (await world.pool()).release(member)
        await world.later(2)
    assert len(world.fleet.stopped) == 3
    assert len(world.fleet.refreshed) == expected


async def test_request_while_its_function_falls_asleep() -> None:
    """It waits for the new snapshot and wakes that, beyond no limit."""
    world = World(Scale(idle_ms=1000, max=1, snapshot="on-idle"))
    (member,) = await world.take(1)
    pool = await world.pool()
    pool.release(member)
    world.clock.now += 2
    world.scaler.tick()
    (woken,) = await world.take(1)
    assert world.fleet.refreshed == world.fleet.stopped == [member.ready.id]
    assert woken.ready.snapshot == "one+"


async def test_instance_that_cannot_be_snapshotted_lives_on() -> None:
    """What it holds is not lost; it serves again, and tries again after its idle time."""
    world = World(Scale(idle_ms=1000, snapshot="on-idle"))
    (member,) = await world.take(1)
    pool = await world.pool()
    pool.release(member)

    async def refuse(instance_id: str) -> None:
        raise VmmFailed(f"no snapshot of {instance_id}")

    world.fleet.refresh = refuse  # type: ignore[method-assign]
    await world.later(2)
    assert (world.fleet.stopped, member.retired) == ([], False)
    assert pool.take() is member
