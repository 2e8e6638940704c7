"""Hydration: everything that lacks, within bounds, behind everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.paged import Gate, Ranges, file_of, put_pack, window
from torpor.pager.cache import ChunkCache
from torpor.pager.hydrating import Hydration
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.store.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import MakeFetcher
    from torpor.pager.served import StoredFile

WINDOWS = 200
SIZE = WINDOWS * WINDOW_BYTES
CONTENTS = {number: window(number) for number in range(0, WINDOWS, 2)}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ChunkCache]:
    """A cache with room for everything."""
    made = ChunkCache(tmp_path / "cache", capacity_bytes=SIZE)
    yield made
    made.close()


@pytest.fixture
def file(store: Ranges, make_fetcher: MakeFetcher, cache: ChunkCache) -> StoredFile:
    """A file of a hundred chunks."""
    entries = put_pack(store, 1, CONTENTS)
    fetcher = make_fetcher(keep=cache.put)
    return file_of(entries, SIZE, store=store, fetcher=fetcher, cache=cache)


def hydrate(file: StoredFile, *, limit_bytes: int = SIZE, limit_s: float = 60) -> Hydration:
    """Hydrate to the end."""
    hydration = Hydration([file], file.fetcher, limit_bytes=limit_bytes, limit_s=limit_s)
    hydration.start()
    assert hydration.wait(60)
    return hydration


def test_everything_comes_once(file: StoredFile, store: Ranges, cache: ChunkCache) -> None:
    """What lacks is fetched in few requests; after that no read needs the store."""
    file.read(SIZE - 10 * WINDOW_BYTES, 10 * WINDOW_BYTES)  # nothing is beside the last ones
    before = file.fetcher.counters()
    hydration = hydrate(file)
    assert hydration.is_complete
    assert file.fetcher.counters().chunks == len(CONTENTS)
    assert hydration.fetched_bytes == file.map.stored_bytes - before.bytes
    store.inject(Fault("any", "error", times=None))
    read = b"".join(file.read(0, SIZE))
    assert read == b"".join(CONTENTS.get(n, bytes(WINDOW_BYTES)) for n in range(WINDOWS))
    assert hydrate(file).fetched_bytes == 0


def test_bounded_by_bytes(file: StoredFile) -> None:
    """It ends before it has fetched more than it may, and is not complete."""
    limit = 70 * WINDOW_BYTES
    hydration = hydrate(file, limit_bytes=limit)
    assert not hydration.is_complete
    assert limit - 2 * WINDOW_BYTES < hydration.fetched_bytes <= limit


def test_bounded_by_time(file: StoredFile, store: Ranges) -> None:
    """When time is up no further batch begins."""
    hydration = hydrate(file, limit_s=-1)
    assert not hydration.is_complete
    assert store.asked == []


def test_ends_at_a_failure(file: StoredFile, store: Ranges) -> None:
    """What cannot be had ends it, harms no file, and it can be begun again."""
    store.inject(Fault("get_range", "denied", times=None))
    assert not hydrate(file).is_complete
    assert file.failure == ""
    store.heal()
    assert hydrate(file).is_complete


def test_stopped(file: StoredFile, store: Ranges) -> None:
    """After the batch that is under way nothing more is begun."""
    gate = Gate()
    store.inject(gate.fault(times=None))
    hydration = Hydration([file], file.fetcher, limit_bytes=SIZE, limit_s=60)
    hydration.start()
    gate.wait()
    hydration.stop()
    gate.open()
    assert hydration.wait(60)
    assert not hydration.is_complete
    assert file.fetcher.counters().chunks < len(CONTENTS)


def test_room_for_less_than_all(store: Ranges, make_fetcher: MakeFetcher, tmp_path: Path) -> None:
    """Where the cache cannot hold everything it does not claim to be complete."""
    small = ChunkCache(tmp_path / "small", capacity_bytes=20 * WINDOW_BYTES)
    entries = put_pack(store, 1, CONTENTS)
    fetcher = make_fetcher(keep=small.put)
    file = file_of(entries, SIZE, store=store, fetcher=fetcher, cache=small)
    assert not hydrate(file).is_complete
    assert small.counters().chunks == 20
    small.close()


def test_without_a_cache(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Where nothing can be kept nothing is fetched."""
    file = file_of(put_pack(store, 1, CONTENTS), SIZE, store=store, fetcher=make_fetcher())
    assert not hydrate(file).is_complete
    assert store.asked == []
