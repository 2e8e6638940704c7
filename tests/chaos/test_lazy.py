"""Lazily woken instances whose pager or store dies under them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import end, journal_of, run_torpor, start, wait_until
from fixtures.vault import NAME, SLICES, ask_slice, check_slice, slice_request
from torpor.errors import DeadlineExceeded, TorporError
from torpor.host.cancel import in_thread
from torpor.node.leftovers import find_leftovers
from torpor.node.node import Node
from torpor.pager.keeper import Places

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from fixtures.minio import MinioServer
    from torpor.config import Settings
    from torpor.host.process import ProcessId
    from torpor.node.live import Instance

pytestmark = [pytest.mark.vm, pytest.mark.chaos, pytest.mark.minio]

GUESTS = 8
KILLS = 20
KILLS_IN_RESTORES = 8
OUTAGE_S = 5.0
PLACES = (
    *("fuse taken", "fuse answering", "fuse answered", "recovering"),
    *("asked begin", "opening", "answering begin", "asked complete", "opened", "registered"),
    *("published", "answering complete"),
    *("asked go", "answering go", "fetching", "fetched"),
    *("asked hydrate", "asked close", "answering close"),
)


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Node]:
    """A node of which nothing may be left: no instance when the body ends, nothing at all then."""
    before = find_leftovers(settings)  # another home of this host may be at work
    async with Node.open(settings) as node:
        try:
            yield node
            assert node.parts.journal.instances() == []
        finally:  # of a test that failed
            for row in node.parts.journal.instances():
                await node.instances.destroy(row.id)
    assert find_leftovers(settings) == before
    assert not (settings.home / "pager").exists()


async def destroy(node: Node, instances: Sequence[Instance]) -> None:
    """Remove instances, all at the same time."""
    await asyncio.gather(*(node.instances.destroy(one.id, vmm=one.vmm) for one in instances))


async def ask_all(instances: Sequence[Instance], first: int) -> None:
    """Ask every instance for another part, all at the same time."""
    await asyncio.gather(*(ask_slice(one, first + n) for n, one in enumerate(instances)))


class Killer:
    """Kills a home's pagers, each once."""

    def __init__(self, settings: Settings) -> None:
        self._places = Places(settings.home)
        self.killed: list[ProcessId] = []

    async def kill(self, after_s: float) -> None:
        """Wait a moment, then end the pager that runs now, or comes next, with SIGKILL."""
        await asyncio.sleep(after_s)
        await in_thread(wait_until, lambda: self._next() is not None)
        pager = self._next()
        assert pager is not None
        pager.signal(signal.SIGKILL)
        self.killed.append(pager)

    def _next(self) -> ProcessId | None:
        pager = self._places.identity("pager")
        return None if pager in self.killed else pager


async def test_pagers_killed_at_random(lazy_settings: Settings) -> None:
    """20 pagers die under 8 restores and their requests: each guest answers, and rightly."""
    chance = random.Random(11)
    killer = Killer(lazy_settings)
    async with opened(lazy_settings) as node:
        restores = asyncio.gather(*(node.restore(NAME) for _ in range(GUESTS)))
        for _ in range(KILLS_IN_RESTORES):
            await killer.kill(chance.uniform(0.1, 0.8))
        guests = await restores
        fresh = iter(range(SLICES))
        while len(killer.killed) < KILLS:
            asked = asyncio.gather(
                *(ask_slice(guest, next(fresh)) for guest in chance.sample(guests, 4))
            )
            await killer.kill(chance.uniform(0.0, 0.3))
            await asked
        await ask_all(guests, SLICES - GUESTS)
        assert node.paging.client.counters()["pid"] not in {one.pid for one in killer.killed}
        await destroy(node, guests)


@pytest.mark.parametrize("places", [PLACES, ("push fetched",), ("push storing",)], ids="; ".join)
async def test_pager_killed_at_each_named_place(
    lazy_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: tuple[str, ...],
) -> None:
    """A pager dies once at each place of its work under 8 restores: all answer rightly.

    A push that was cut off is not begun again, so each of its places has restores of its own.
    """
    barriers = tmp_path / "barriers"
    barriers.mkdir()
    for place in places:
        (barriers / place).touch()
    monkeypatch.setenv("TORPOR_PAGER_BARRIER", f"*={barriers}")
    async with opened(replace(lazy_settings, hydrate_bytes=1 << 20)) as node:
        guests = await asyncio.gather(*(node.restore(NAME) for _ in range(GUESTS)))
        await ask_all(guests, 0)
        await destroy(node, guests)
    assert list(barriers.iterdir()) == [], "it was never there"


async def test_store_stops_for_a_while(lazy_settings: Settings, minio: MinioServer) -> None:
    """MinIO is dead for 5 s in the middle of 8 restores: each guest answers, only later."""
    async with opened(lazy_settings) as node:
        node.paging.pushes = False  # what comes by demand meets the outage for certain
        invocations = asyncio.gather(
            *(node.invoke(NAME, slice_request(number)) for number in range(GUESTS))
        )
        await in_thread(wait_until, lambda: has_vmm(node))
        minio.kill()
        began_s = time.monotonic()
        await asyncio.sleep(OUTAGE_S)
        assert not invocations.done()
        minio.start()
        for number, invoked in enumerate(await invocations):
            check_slice(invoked.response, number, invoked.instance_id)
        assert time.monotonic() - began_s >= OUTAGE_S


async def test_store_stops_for_good(lazy_settings: Settings, minio: MinioServer) -> None:
    """MinIO dies in the middle of 8 restores and stays so: clear errors, and nothing is left."""
    settings = replace(
        lazy_settings, pager_deadline_s=3.0, store_retry_s=3.0, request_timeout_s=20.0
    )
    async with opened(settings) as node:
        node.paging.pushes = False
        invocations = asyncio.gather(
            *(node.invoke(NAME, slice_request(number)) for number in range(GUESTS)),
            return_exceptions=True,
        )
        await in_thread(wait_until, lambda: has_vmm(node))
        minio.kill()
        results = await invocations
    words = []
    for error in results:
        assert isinstance(error, TorporError), error
        words.append(f"{error} {error.reason}")
        assert error.hint
    assert any("window" in text for text in words), words
    assert all("window" in text or "store" in text for text in words), words


async def test_store_hangs_under_a_function(lazy_settings: Settings, minio: MinioServer) -> None:
    """A request that takes too long for a window's sake says which; it can be repeated later."""
    settings = replace(lazy_settings, request_timeout_s=5.0)
    async with opened(settings) as node:
        node.paging.pushes = False
        guest = await node.restore(NAME)
        minio.kill()
        with pytest.raises(DeadlineExceeded) as caught:
            await node.invoke(NAME, slice_request(1))
        assert "a window has not come yet: memory: window " in caught.value.reason
        minio.start()
        await ask_slice(guest, 1)
        await destroy(node, [guest])


async def test_push_ends_the_pager(lazy_settings: Settings, tmp_path: Path) -> None:
    """Push, export and verify of what is open lazily need the pager only while they run."""
    async with opened(lazy_settings) as node:
        await node.invoke(NAME, slice_request(0))
        pager = lazy_settings.home / "pager"
        for work in (
            lambda: node.push(NAME, name="again"),
            lambda: node.export(NAME, tmp_path / "archive"),
            lambda: node.verify(NAME),
        ):
            assert not pager.exists()
            await work()
        assert not pager.exists()


def has_vmm(node: Node) -> bool:
    """Whether a VM has been started."""
    return any(row.vmm for row in node.parts.journal.instances())


@pytest.fixture
def environment(lazy_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings that real commands get by their environment."""
    for name in ("s3_endpoint", "s3_access_key_id", "s3_secret_access_key", "key"):
        monkeypatch.setenv(f"TORPOR_{name.upper()}", getattr(lazy_settings, name))
    monkeypatch.setenv("TORPOR_LAZY", "yes")
    return lazy_settings


def kill_pager(settings: Settings) -> None:
    """End keeper and pager so that neither replaces the other."""
    keeper = Places(settings.home).identity("keeper")
    pager = Places(settings.home).identity("pager")
    assert keeper is not None
    assert pager is not None
    for process, signum in (
        (keeper, signal.SIGSTOP),
        (pager, signal.SIGKILL),
        (keeper, signal.SIGKILL),
    ):
        process.signal(signum)


def running(settings: Settings) -> list[ProcessId]:
    """The VMs of instances that are ready."""
    with contextlib.suppress(sqlite3.Error):
        rows = journal_of(settings).instances()
        return [row.vmm for row in rows if row.state == "running" and row.vmm is not None]
    return []


def test_pager_and_keeper_killed(environment: Settings) -> None:
    """VMs that lost their memory are removed by the next command though they still live."""
    before = find_leftovers(environment)
    run_torpor(environment, "restore", NAME)
    (vmm,) = running(environment)
    vmm.signal(signal.SIGSTOP)  # it cannot meet a page that is not there
    kill_pager(environment)
    assert vmm.is_alive()
    assert json.loads(run_torpor(environment, "ps", "--json")) == []
    assert not vmm.is_alive()
    assert find_leftovers(environment) == before
    answer = json.loads(run_torpor(environment, "invoke", NAME, "--json"))
    assert answer["status"] == 200
    assert find_leftovers(environment) == before


@pytest.mark.parametrize("ready", [True, False], ids=["ready", "in mid-restore"])
def test_everything_killed_at_once(environment: Settings, *, ready: bool) -> None:
    """SIGKILL of VM, pager, keeper and command together, then `torpor ps`: nothing is left."""
    before = find_leftovers(environment)
    command = start(environment, "restore", NAME, "--wait")
    journal = environment.home / "journal.sqlite"

    def is_there() -> object:
        if not journal.exists():
            return False
        return running(environment) if ready else journal_of(environment).instances()

    wait_until(is_there)
    vmms = [row.vmm for row in journal_of(environment).instances() if row.vmm is not None]
    command.send_signal(signal.SIGSTOP)
    kill_pager(environment)
    for vmm in vmms:
        vmm.signal(signal.SIGKILL)
    command.kill()
    end(command)
    assert find_leftovers(environment) != before
    assert json.loads(run_torpor(environment, "ps", "--json")) == []
    assert find_leftovers(environment) == before
