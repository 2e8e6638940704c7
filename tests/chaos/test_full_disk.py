"""A daemon on a disk that is full: it says so, loses nothing, leaves nothing, and goes on after.

The disk is an ext4 of the test's own. On it is all of the home; the store is on another one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import end, journal_of, start, wait_until
from fixtures.daemons import DaemonProcess
from fixtures.nodes import EXAMPLES
from fixtures.small_disks import small_disk
from fixtures.victims import Victim, ask, snapshots_of
from torpor.errors import NoSpace
from torpor.node.leftovers import find_leftovers
from torpor.vmm.qemu.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from fixtures.small_disks import SmallDisk
    from torpor.config import Settings

pytestmark = [pytest.mark.vm, pytest.mark.chaos]

_KIB = 1 << 10
_MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that is not full yet."""
    with small_disk(tmp_path / "node", size_bytes=900 * _MIB) as disk:
        yield disk


@pytest.fixture
def victim(deployed: Settings, disk: SmallDisk, tmp_path: Path) -> Iterator[Victim]:
    """A daemon on a copy of the session's home, and a ledger with a row."""
    words = ["cp", "-a", "--sparse=always", f"{deployed.home}/.", disk.root]
    subprocess.run(words, check=True)
    settings = replace(deployed, home=disk.root)
    served = DaemonProcess(disk.root, {"store": deployed.store, "key": deployed.key})
    victim = Victim(settings, served, tmp_path / "no-barrier")
    served.start()
    try:
        victim.keep()
        yield victim
    finally:
        disk.free()
        victim.end({row.id for row in journal_of(settings).instances()})
        assert served.stop() == 0
    assert find_leftovers(settings) == []
    assert "Traceback" not in served.said()


def test_operations(victim: Victim, disk: SmallDisk) -> None:
    """Whatever room is left, each says that the disk is full or is done; nothing is in between.

    What ends or removes something is done on a full disk too. Freed, it all works again.
    """
    with victim.served.client() as client:
        gateway = client.status().gateway
        before = snapshots_of(victim)

        def needs(work: Callable[[], list[str]]) -> int:
            used_bytes = disk.used_bytes()
            made = work()
            used_bytes = disk.used_bytes() - used_bytes
            client.stop(made)
            return used_bytes

        def refused(work: Callable[[], object], *rooms_bytes: int) -> None:
            for room_bytes in rooms_bytes:
                disk.fill(room_bytes=room_bytes)
                with pytest.raises(NoSpace, match="full") as caught:
                    work()
                assert caught.value.hint, caught.value
                assert victim.check() == set()
                assert snapshots_of(victim) == before
            disk.free()

        one = needs(lambda: [client.restore("hello").instance])
        refused(lambda: client.restore("hello"), 0, one // 2)
        more = needs(lambda: [clone.instance for clone in client.fork(victim.kept).clones])
        refused(lambda: client.fork(victim.kept), more - one // 2)  # the clone finds no room
        rooms = (0, 12 * _KIB, 64 * _KIB, more // 2)
        refused(lambda: client.create_snapshot(victim.kept, name="cut-off"), *rooms)
        refused(lambda: client.deploy(EXAMPLES / "hello", name="brief"), 0, more // 2)
        disk.fill()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{gateway}/f/hello/", timeout=60)
        with caught.value as answer:
            assert answer.code == 507
            assert json.load(answer)["detail"] == "this node's disk is full"
        disk.free()
        woken = client.restore("hello").instance
        client.create_snapshot(woken, name="aside")
        disk.fill()
        assert client.stop([woken]) == [woken]
        client.remove_snapshot("aside")
        assert client.remove_function("hello").stopped == ()
        assert victim.check() == set()
        assert snapshots_of(victim) < before
        disk.free()
        assert client.deploy(EXAMPLES / "hello").revision == 1
        with urllib.request.urlopen(f"{gateway}/f/hello/", timeout=60) as answered:
            assert answered.status == 200
        assert len(client.fork(victim.kept).clones) == 1
        assert len(victim.check()) == 2


def test_writes_of_a_guest(victim: Victim, disk: SmallDisk) -> None:
    """A VM that finds the disk full stands still, says so, and goes on when there is room.

    Without a daemon the next command sees to that.
    """
    socket = disk.root / "instances" / victim.kept / "qmp.sock"
    with ThreadPoolExecutor(1) as pool, victim.served.client() as client:

        def write_until_full() -> Future[list[None]]:
            disk.fill()
            adding = pool.submit(lambda: [victim.add_row("x" * 60_000) for _ in range(30)])
            wait_until(lambda: asyncio.run(status_of(socket)) == "io-error")
            assert not adding.done()
            return adding

        adding = write_until_full()
        assert [view.state for view in client.instances()] == ["stalled"]
        with pytest.raises(NoSpace, match="stands still"):
            client.create_snapshot(victim.kept, name="while-full")
        disk.free()
        adding.result(timeout=30)
        assert ask(victim.address)["integrity"] == "ok"
        client.create_snapshot(victim.kept, name="full-of-rows")
        client.remove_snapshot("full-of-rows")

        assert victim.served.stop() == 0
        adding = write_until_full()
        code, out, err = end(start(victim.settings, "ps"))
        assert (code, "stalled" in out, f"{victim.kept} stands still" in err) == (0, True, True)
        assert "free some space" in err
        code, _, err = end(start(victim.settings, "invoke", "ledger"))
        assert (code, "found the disk full" in err) == (NoSpace.exit_code, True)
        disk.free()
        code, out, err = end(start(victim.settings, "invoke", "ledger"))
        assert (code, "it goes on now" in err) == (0, True), err
        adding.result(timeout=30)
        victim.served.start()
        assert ask(victim.address)["integrity"] == "ok"
    assert victim.check() == set()


async def status_of(socket: Path) -> str:
    """What QEMU says of its VM."""
    monitor = Monitor("of a test")
    await monitor.connect(socket)
    try:
        return str((await monitor.execute("query-status"))["status"])
    finally:
        await monitor.close()
