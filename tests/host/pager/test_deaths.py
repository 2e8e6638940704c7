"""Pagers and keepers die at any moment: readers wait, and nothing is left when nobody lives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import pytest

from fixtures.pagers import ROUNDS, PagerHome, sha256_of
from torpor.host.process import find_processes_in
from torpor.pager.client import PagerClient
from torpor.pager.control import PagerGone
from torpor.units import MiB

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.fuse_server import Reader

pytestmark = [pytest.mark.host, pytest.mark.chaos]

KILLS = 20
READERS = 8
PLACES = (
    *("fuse taken", "fuse answering", "fuse answered"),
    *("asked begin", "opening", "answering begin", "asked complete", "opened", "registered"),
    *("published", "answering complete"),
    *("asked go", "answering go", "push fetched", "push storing"),
    *("fetching", "fetched"),
    *("asked hydrate", "asked close", "answering close"),
)


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_a_named_place(
    home: PagerHome, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A pager that is killed there once is replaced; whoever asked or read gets what is right."""
    home.publish()
    barrier = home.directory / "barrier"
    barrier.touch()
    monkeypatch.setenv("TORPOR_PAGER_BARRIER", f"{place}={barrier}")
    served = home.open()
    with home.known(served):
        home.client.go(served.digest)
        home.check("f", served)
        home.client.wait_pushed(served.digest, timeout_s=60)
        home.client.hydrate(served.digest, limit_bytes=64 * MiB, limit_s=60)
        home.drop(served)
        home.check("f", served)
    assert home.client.close(served.digest) == 0
    assert not barrier.exists(), "it was never there"
    home.check("f", home.open())


def test_killed_while_it_recovers(home: PagerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """A successor that dies before it serves anything has a successor itself."""
    barrier = home.directory / "barrier"
    monkeypatch.setenv("TORPOR_PAGER_BARRIER", f"recovering={barrier}")
    home.publish()
    served = home.open()
    barrier.touch()
    home.signal("pager")
    home.check("f", served)
    assert not barrier.exists()


def test_killed_at_random_under_readers(home: PagerHome) -> None:
    """20 pagers die while 8 readers map files over and over: every byte is right, all go on."""
    chance = random.Random(5)
    home.publish(windows=range(256))
    served = home.open()
    expected = {sha256_of(home.original("f", name)): name for name in served.files}
    files = [("memory", "image")[number % 2] for number in range(READERS)]
    readers = [home.read(served.files[file], ROUNDS) for file in files]
    for reader in readers:
        assert reader.line() == "opened"
    for _ in range(KILLS):
        home.signal("pager")
        for reader in chance.sample(readers, chance.randrange(1, 4)):
            assert expected[reader.line()]
    for reader, file in zip(readers, files, strict=True):
        reader.go()
        assert {expected[digest] for digest in reader.result().split()} <= {file}
    assert home.client.counters()["snapshots"][served.digest]["files"]["memory"]["reads"] > 0


def test_keeper_dies_then_pager(home: PagerHome) -> None:
    """A pager goes on without its keeper; the next command gives it another, which replaces it."""
    home.publish()
    served = home.open()
    for _ in range(3):
        before = home.places.identity("keeper")
        home.signal("keeper")
        assert before is not None
        assert before.wait(timeout_s=60)
        home.drop(served)
        home.check("f", served)
        assert home.client.opened() == [served.digest]
        assert home.places.identity("keeper") != before
        home.signal("pager")
        home.drop(served)
        home.check("f", served)


def test_pager_dies_then_keeper(home: PagerHome) -> None:
    """A successor outlives the keeper that started it."""
    home.publish()
    served = home.open()
    home.signal("pager")
    assert home.client.opened() == [served.digest]
    keeper = home.places.identity("keeper")
    assert keeper is not None
    keeper.kill()
    home.drop(served)
    home.check("f", served)
    home.client.stop()
    home.check_nothing_left()


def test_orphan_is_stopped(home: PagerHome) -> None:
    """A pager without a keeper ends when it is told to, and nothing is left."""
    home.publish()
    home.check("f", home.open())
    keeper = home.places.identity("keeper")
    assert keeper is not None
    keeper.kill()
    home.client.stop()
    home.check_nothing_left()


def kill_both(home: PagerHome) -> None:
    """End keeper and pager so that neither can replace the other."""
    home.signal("keeper", signal.SIGSTOP)
    home.signal("pager")
    home.signal("keeper")


def test_both_die(home: PagerHome) -> None:
    """Readers of a home without pager and keeper end with an error after reconcile; all is gone."""
    home.publish(windows=range(256))
    served = home.open()
    readers = [home.read(served.files["memory"], ROUNDS) for _ in range(4)]
    for reader in readers:
        assert reader.line() == "opened"
    kill_both(home)
    assert home.client.failure(served.digest) == "the pager ended"
    assert home.client.close(served.digest) == 0
    with pytest.raises(PagerGone):
        home.client.counters()
    assert not home.client.reconcile()
    home.check_nothing_left()
    for reader in readers:
        assert reader.end()[0] != 0
    assert not home.client.reconcile()
    home.check("f", home.open())


def test_asking_starts_no_pager(home: PagerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pager that dies while it is asked has no successor that knows nothing of what is asked."""
    home.publish()
    served = home.open()
    kill_both(home)
    home.client.reconcile()
    monkeypatch.setattr(PagerClient, "_answers", lambda client: True)  # it did a moment ago
    assert home.client.failure(served.digest) == "the pager ended"
    assert home.client.waiting(served.digest) == "the pager ended"
    assert home.client.close(served.digest) == 0
    for ask in (home.client.counters, home.client.opened):
        with pytest.raises(PagerGone):
            ask()
    assert find_processes_in(home.settings.home) == []
    monkeypatch.undo()
    assert not home.client.is_running()


def test_new_pager_after_both_died(home: PagerHome) -> None:
    """The next command that needs a pager clears up and starts one by itself."""
    home.publish()
    home.open()
    kill_both(home)
    again = home.open()
    home.check("f", again)
    assert home.client.opened() == [again.digest]


def test_stopped_under_readers(home: PagerHome) -> None:
    """Stopping ends everything at once; who still reads gets an error, never waits."""
    home.publish(windows=range(256))
    served = home.open()
    readers = [home.read(served.files["memory"], ROUNDS) for _ in range(4)]
    for reader in readers:
        assert reader.line() == "opened"
    home.client.stop()
    home.check_nothing_left()
    assert all(reader.end()[0] != 0 for reader in readers)


@pytest.mark.parametrize("who", ["keeper", "pager"])
def test_asked_to_end(home: PagerHome, who: str) -> None:
    """SIGTERM to either of them ends both in order, and nothing is left."""
    home.publish()
    home.open()
    keeper = home.places.identity("keeper")
    assert keeper is not None
    home.signal(who, signal.SIGTERM)
    assert keeper.wait(timeout_s=60)
    home.check_nothing_left()


def test_unmounted_by_somebody(home: PagerHome) -> None:
    """When somebody takes the mount away, the pager ends and the next open has a new one."""
    home.publish()
    home.open()
    keeper = home.places.identity("keeper")
    assert keeper is not None
    subprocess.run(["umount", "-l", home.places.mount], check=True)
    assert keeper.wait(timeout_s=60)
    home.check("f", home.open())


CLIENT = """
import sys, msgspec
from pathlib import Path
from torpor.config import Settings
from torpor.pager.client import PagerClient
from torpor.pager.source import Source
source = msgspec.json.decode(sys.argv[2], type=Source)
client = PagerClient(Settings(home=Path(sys.argv[1])))
print("asking", flush=True)
client.open("f", source)
"""


def test_client_dies_in_mid_open(home: PagerHome) -> None:
    """A command that is killed while it waits for its snapshot harms nobody."""

    home.publish("f")
    home.publish("g", seed=2)
    other = home.open("g")
    home.signal("pager", signal.SIGSTOP)
    arguments = [home.settings.home, msgspec.json.encode(home.source).decode()]
    child = subprocess.Popen(
        [sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "asking\n"
    child.kill()
    child.wait()
    home.signal("pager", signal.SIGCONT)
    home.check("g", other)
    served = home.open("f")
    home.check("f", served)
    assert home.client.close(served.digest) == 1


def test_many_clients_of_a_fresh_home(home: PagerHome) -> None:
    """Commands that all need the pager first start one keeper and one pager."""
    home.publish()
    with ThreadPoolExecutor(8) as threads:
        served = list(threads.map(lambda _: home.open(), range(8)))
    assert len({one.digest for one in served}) == 1
    assert len(find_processes_in(home.places.directory)) == 2


def descriptors_of(home: PagerHome, who: str) -> list[str]:
    """What a process has open."""
    identity = home.places.identity(who)
    assert identity is not None
    directory = f"/proc/{identity.pid}/fd"
    return [os.readlink(f"{directory}/{number}") for number in os.listdir(directory)]


def test_what_a_pager_inherits(home: PagerHome) -> None:
    """The keeper has one thread and no store when it forks; the pager gets no pipe of the start."""
    home.client.ensure()
    keeper = home.places.identity("keeper")
    assert keeper is not None
    assert len(os.listdir(f"/proc/{keeper.pid}/task")) == 1
    home.signal("pager")
    assert home.client.opened() == []
    for who in ("keeper", "pager"):
        found = descriptors_of(home, who)
        assert [name for name in found if name.startswith("pipe:")] == [], who
        assert found.count("/dev/fuse") == 4
    assert len(os.listdir(f"/proc/{keeper.pid}/task")) == 1


def test_pager_that_cannot_live(home: PagerHome, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper whose pagers all die gives up, unmounts and leaves nothing to wait for."""
    home.publish()
    served = home.open()
    reader: Reader = home.read(served.files["memory"], ROUNDS)
    assert reader.line() == "opened"
    keeper = home.places.identity("keeper")
    assert keeper is not None
    cache = home.settings.home / "snapshots"
    cache.rename(home.settings.home / "moved")
    cache.write_bytes(b"no directory")
    home.signal("pager")
    assert keeper.wait(timeout_s=60)
    assert reader.end()[0] != 0
    cache.unlink()
    (home.settings.home / "moved").rename(cache)
    home.check("f", home.open())


WITHOUT_FUSE = """
import sys
from pathlib import Path
from torpor.config import Settings
from torpor.errors import HostUnfit
from torpor.pager.client import PagerClient
client = PagerClient(Settings(home=Path(sys.argv[1])))
try:
    client.ensure()
except HostUnfit as error:
    print(error)
    print(client.is_running(), list((Path(sys.argv[1])).iterdir()))
"""


def test_host_without_fuse(tmp_path: Path) -> None:
    """Where /dev/fuse cannot be opened, whoever needs a pager is told that; nothing is left."""
    program = 'touch "$1/f" && python3 -c "import socket; socket.socket(1).bind(\'$1/s\')"'
    shell = f'{program} && mount --bind "$1/s" /dev/fuse && exec "$2" -c "$3" "$1/home"'
    words = ["unshare", "--mount", "sh", "-ec", shell, "sh", str(tmp_path), sys.executable]
    result = subprocess.run([*words, WITHOUT_FUSE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "the pager did not start" in result.stdout
    assert "/dev/fuse cannot be opened" in result.stdout
    assert result.stdout.splitlines()[-1] == f"False [PosixPath('{tmp_path}/home/locks')]"
