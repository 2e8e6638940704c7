"""What a pager serves is the snapshot, from wherever it comes, and comes once."""

from __future__ import annotations

import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fixtures.pagers import PagerHome, sha256_of
from torpor.errors import Damaged, NotFound
from torpor.snapshot.local import LocalSnapshots
from torpor.snapshot.repository.repository import Repository
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.faulty_http import FaultyProxy

pytestmark = pytest.mark.host

PUSHED = (0, 3, 6, 7, 9, 60)


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.minio)])
def any_home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PagerHome]:
    """A home on each kind of store."""
    with PagerHome(tmp_path / "n", request.getfixturevalue(f"{request.param}_settings")) as made:
        yield made


def test_bit_for_bit(any_home: PagerHome) -> None:
    """Memory, image and app read as the snapshot's: read and mapped, before and after a push."""
    snapshot = any_home.publish()
    served = any_home.open(push=False)
    assert served.digest == snapshot.digest
    any_home.check("f", served)
    any_home.drop(served)
    any_home.check("f", served, program="whole")
    assert any_home.client.close(served.digest) == 0
    again = any_home.open()
    with any_home.known(again):
        any_home.client.go(again.digest)
        assert any_home.client.wait_pushed(again.digest, timeout_s=60)
        any_home.check("f", again)


def test_the_snapshot_is_the_nodes(home: PagerHome) -> None:
    """What is opened is among the node's snapshots: disk and device state there, memory served.

    The disk is served as well, for who has no other copy, until it is closed.
    """
    snapshot = home.publish()
    served = home.open()
    disk = home.places.mount / "snapshots" / snapshot.digest / "disk"
    assert home.read(disk, "whole").result() == sha256_of(snapshot.disk)
    found = LocalSnapshots(home.settings.home / "snapshots").get(snapshot.digest)
    assert found.memory == served.files["memory"]
    for name in ("disk", "vmstate"):
        there = (snapshot.directory / name).read_bytes()
        assert (found.directory / name).read_bytes() == there
    home.client.close(snapshot.digest)
    assert not disk.exists()
    with pytest.raises(NotFound, match="no-such-thing"):
        home.open("no-such-thing")


def test_a_ref_that_was_just_read_is_not_read_again(home: PagerHome) -> None:
    """Its object is enough, and checked like any other: for its name, and whether it is whole."""
    home.publish("f")
    repository = Repository(open_store(home.settings), home.keyring)
    ref = repository.read_ref("f")
    assert ref is not None

    def requests_of(name: str, sealed: bytes) -> int:
        home.client.ensure()
        before = home.client.counters()["store"]["requests"]
        begun = home.client.begin(name, home.source, push=False, ref=sealed)
        home.client.complete(begun.digest)
        after = home.client.counters()["store"]["requests"]
        home.client.close(begun.digest)
        return int(after - before)

    assert requests_of("f", ref.sealed) == requests_of("f", b"") - 1
    for name, sealed in (("g", ref.sealed), ("f", ref.sealed[:-1] + b"?")):
        with pytest.raises(Damaged, match=f"object refs/{name} in the store is damaged"):
            requests_of(name, sealed)


def test_what_is_pushed_is_never_asked_for(home: PagerHome) -> None:
    """Windows that were pushed are read through a mapping without one read by the kernel."""
    snapshot = home.publish()
    whole = snapshot.memory.read_bytes()
    served = home.open()
    with home.known(served) as opened:
        home.client.go(served.digest)
        assert home.client.wait_pushed(served.digest, timeout_s=60)
        memory = mmap.mmap(opened["memory"], 0, flags=mmap.MAP_PRIVATE)
        for window in PUSHED:
            place = slice(window * WINDOW_BYTES, (window + 1) * WINDOW_BYTES)
            assert memory[place] == whole[place]
        assert os.pread(opened["image"], 2 * WINDOW_BYTES, 0)
        counted = home.counted("f")
        assert (counted["pushed"], counted["reads"]) == (len(PUSHED), 0)
        assert home.counted("f", "image")["reads"] == 0
        assert memory[99 * WINDOW_BYTES] == whole[99 * WINDOW_BYTES]
        assert home.counted("f")["reads"] >= 1
        memory.close()
    assert home.client.counters()["snapshots"][served.digest]["push"]["failure"] == ""


def test_a_fault_brings_little(home: PagerHome) -> None:
    """One touched byte of a private mapping asks for no more than two windows."""
    home.publish(windows=range(256))
    served = home.open(push=False)
    with home.known(served) as opened:
        memory = mmap.mmap(opened["memory"], 0, flags=mmap.MAP_PRIVATE)
        memory[100 * WINDOW_BYTES]
        memory.close()
    counted = home.counted("f")
    assert 1 <= counted["store"] <= 2


@pytest.mark.minio
def test_many_at_once_come_once(proxied: PagerHome, proxy: FaultyProxy) -> None:
    """16 opens and readers of one snapshot take at most 1.2 times the bytes that one does."""

    def use(home: PagerHome, times: int) -> tuple[int, int]:
        seen = len(proxy.seen)

        def one(_: int) -> None:
            served = home.open()
            with home.known(served) as opened:
                home.client.go(served.digest)
                assert home.client.wait_pushed(served.digest, timeout_s=60)
                size = os.fstat(opened["memory"]).st_size
                data = b"".join(
                    os.pread(opened["memory"], WINDOW_BYTES, place)
                    for place in range(0, size, WINDOW_BYTES)
                )
                assert data == whole

        with ThreadPoolExecutor(times) as threads:
            list(threads.map(one, range(times)))
        counted = home.client.counters()
        (snapshot,) = counted["snapshots"].values()
        fetched = counted["fetched"]["bytes"] + snapshot["push"]["fetched_bytes"]
        targets = [target for _, target, _ in proxy.seen[seen:] if "/refs/" not in target]
        return fetched, len(targets)

    whole = proxied.publish().memory.read_bytes()
    with proxied.other_home("one") as other:
        one_bytes, one_requests = use(other, 1)
    many_bytes, many_requests = use(proxied, 16)
    assert many_bytes <= 1.2 * one_bytes
    assert many_requests <= 1.5 * one_requests  # how they are joined depends on what comes when


def test_different_ones_at_once(home: PagerHome) -> None:
    """Two snapshots that share an image are served together; one goes, the other stays right."""
    image = home.node.make_image(50, size_bytes=40 * WINDOW_BYTES + 100)
    home.publish("f", seed=1, image=image)
    home.publish("g", seed=2, image=image)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(home.open, ("f", "g"))
    assert first.files["image"] == second.files["image"]
    home.check("f", first)
    assert sorted(home.client.opened()) == sorted([first.digest, second.digest])
    assert home.client.close(first.digest) == 1
    assert not first.files["memory"].exists()
    home.drop(second)
    home.check("g", second)


def test_closing_frees(home: PagerHome) -> None:
    """After a close nothing is open, kept for a successor, protected or served; it opens again."""
    home.publish()
    served = home.open()
    home.check("f", served)
    assert home.client.counters()["cache"]["protected"] > 0
    assert home.client.close(served.digest) == 0
    assert home.client.close(served.digest) == 0
    assert home.client.opened() == []
    assert home.client.counters()["cache"]["protected"] == 0
    assert [path for path in (home.places.directory / "open").rglob("*") if path.is_file()] == []
    for path in served.files.values():
        with pytest.raises(FileNotFoundError):
            os.open(path, os.O_RDONLY)
    with pytest.raises(NotFound, match="not open"):
        home.client.go(served.digest)
    fetched = home.client.counters()["fetched"]["chunks"]
    home.check("f", home.open())
    assert home.client.counters()["fetched"]["chunks"] == fetched


def test_hydrated_needs_no_store(home: PagerHome) -> None:
    """After hydration every window is here: with the store deleted all reads are right."""
    home.publish()
    served = home.open()
    home.client.hydrate(served.digest, limit_bytes=64 << 20, limit_s=60)
    assert home.client.wait_hydrated(served.digest, timeout_s=60)
    shutil.rmtree(home.directory.parent / "store")
    home.check("f", served)
    assert home.counted("f")["store"] == 0


def test_next_time_nothing_is_fetched(home: PagerHome) -> None:
    """A new pager of the same home finds chunks and working set on the disk."""
    home.publish()
    served = home.open()
    with home.known(served):
        home.client.go(served.digest)
        assert home.client.wait_pushed(served.digest, timeout_s=60)
    home.drop(served)
    home.check("f", served)
    home.client.stop()
    home.check_nothing_left()
    again = home.open()
    with home.known(again):
        home.client.go(again.digest)
        assert home.client.wait_pushed(again.digest, timeout_s=60)
        home.check("f", again)
    counted = home.client.counters()
    assert counted["fetched"]["requests"] == 0
    assert counted["snapshots"][again.digest]["push"]["fetched_bytes"] == 0


def test_a_home_behind_a_link(home: PagerHome, tmp_path: Path) -> None:
    """A home that is reached through a symbolic link is served, and unmounted at the end."""
    home.publish()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with home.other_home("../link/b") as other:
        other.check("f", other.open())


def test_sizes(home: PagerHome) -> None:
    """Files have the snapshot's sizes, and are for root alone."""
    home.publish()
    served = home.open()
    for name, path in served.files.items():
        status = path.stat()
        assert status.st_size == home.original("f", name).stat().st_size
        assert status.st_mode & 0o777 == 0o444
    assert sha256_of(served.files["app"]) == sha256_of(home.original("f", "app"))
