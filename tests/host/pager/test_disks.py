"""What a chunk cache's disk may do: be full, read-only, wrong or gone. Reads stay right."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.pagers import PagerHome
    from torpor.pager.client import Served

pytestmark = pytest.mark.host


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    """A file system of its own at a directory that is made."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def check_twice(home: PagerHome, served: Served) -> None:
    """All files read right, now and when the page cache has forgotten them."""
    for _ in range(2):
        home.check("f", served)
        home.drop(served)


def test_full(home: PagerHome) -> None:
    """Without room for chunks and copies everything is fetched as often as it is needed."""
    home.publish()
    with tmpfs(home.settings.home / "cache", "size=200k"):
        served = home.open()
        with home.known(served):
            home.client.go(served.digest)
            assert home.client.wait_pushed(served.digest, timeout_s=60)
            home.drop(served)
            check_twice(home, served)
        counted = home.client.counters()["cache"]
        assert counted["failures"] > 0
        assert counted["chunks"] < 20
        home.client.stop()


def test_read_only(home: PagerHome) -> None:
    """Where nothing can be written there is no cache, and all else works."""
    home.publish()
    with tmpfs(home.settings.home / "cache", "ro"):
        served = home.open()
        with home.known(served):
            home.client.go(served.digest)
            assert home.client.wait_pushed(served.digest, timeout_s=60)
            check_twice(home, served)
        assert home.client.counters()["cache"] is None
        home.client.stop()


def test_corrupted_under_way(home: PagerHome) -> None:
    """Bits that flip in every slot are found one by one, and what is right is fetched again."""
    home.publish()
    served = home.open(push=False)
    check_twice(home, served)
    slots = home.settings.home / "cache" / "chunks" / "slots"
    with slots.open("r+b") as stream:
        for slot in range(home.client.counters()["cache"]["chunks"]):
            stream.seek(slot * 16384 + 7)
            byte = stream.read(1)
            stream.seek(slot * 16384 + 7)
            stream.write(bytes([byte[0] ^ 4]))
    fetched = home.client.counters()["fetched"]["chunks"]
    check_twice(home, served)
    counted = home.client.counters()
    assert counted["cache"]["damaged"] == fetched
    assert counted["fetched"]["chunks"] == 2 * fetched


def test_cut_under_way(home: PagerHome) -> None:
    """A cache whose files are cut to nothing costs fetches, and no pager dies of it."""
    home.publish()
    served = home.open(push=False)
    check_twice(home, served)
    pager = home.places.identity("pager")
    for name in ("slots", "table"):
        with (home.settings.home / "cache" / "chunks" / name).open("r+b") as stream:
            stream.truncate(0)
    check_twice(home, served)
    assert home.places.identity("pager") == pager


def test_deleted_under_way(home: PagerHome) -> None:
    """A cache that is deleted while it is in use serves on; the next pager begins a new one."""
    home.publish()
    served = home.open()
    check_twice(home, served)
    shutil.rmtree(home.settings.home / "cache")
    check_twice(home, served)
    home.signal("pager")
    check_twice(home, served)
    assert home.client.counters()["cache"]["chunks"] > 0


def test_smaller_than_what_is_open(home: PagerHome) -> None:
    """A cache without room for what is open keeps a part, and reads stay right."""

    small = dataclasses.replace(home.settings, cache_bytes=30 * 16384)
    home.publish()
    with type(home)(home.directory / "small", small) as other:
        other.made, other.node = home.made, home.node
        served = other.open()
        check_twice(other, served)
        assert other.client.counters()["cache"]["chunks"] <= 30
