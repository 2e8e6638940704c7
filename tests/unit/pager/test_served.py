"""Served files: right bytes wherever they are, counted, and an end when a window cannot be had."""

from __future__ import annotations

import concurrent.futures
import errno
from typing import TYPE_CHECKING

import pytest

from fixtures.paged import DOMAIN, Ranges, file_of, map_of, pack_id, put_pack, window
from torpor.errors import StoreUnreachable
from torpor.host.fuse.files import Call
from torpor.pager.cache import ChunkCache
from torpor.pager.served import Content, LocalFile, ServedFiles, StoredFile
from torpor.snapshot.repository.repository import pack_key
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.store.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from conftest import MakeFetcher
    from torpor.host.fuse.files import Buffer

SIZE = 9 * WINDOW_BYTES + 777
CONTENTS = {0: window(0), 1: window(1), 4: window(4), 5: window(1), 9: window(9, 777)}
WHOLE = b"".join(
    CONTENTS.get(number, bytes(WINDOW_BYTES)).ljust(WINDOW_BYTES, b"\0") for number in range(10)
)[:SIZE]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ChunkCache]:
    """A cache with room for everything."""
    made = ChunkCache(tmp_path / "cache", capacity_bytes=64 * WINDOW_BYTES)
    yield made
    made.close()


@pytest.fixture
def file(store: Ranges, make_fetcher: MakeFetcher, cache: ChunkCache) -> StoredFile:
    """A file with holes, one chunk twice in it, and a short last window."""
    entries = put_pack(store, 1, CONTENTS)
    fetcher = make_fetcher(workers=2, keep=cache.put)
    return file_of(entries, SIZE, store=store, fetcher=fetcher, cache=cache)


def joined(pieces: Sequence[Buffer]) -> bytes:
    """The pieces of a read."""
    return b"".join(pieces)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, SIZE),
        (0, WINDOW_BYTES),
        (100, 1),
        (WINDOW_BYTES - 1, 2),
        (WINDOW_BYTES, 3 * WINDOW_BYTES),
        (3 * WINDOW_BYTES + 4096, 2 * WINDOW_BYTES),
        (SIZE - 1, 1),
        (9 * WINDOW_BYTES, 777),
        (8 * WINDOW_BYTES + 5, WINDOW_BYTES),
    ],
)
def test_any_part(file: StoredFile, offset: int, length: int) -> None:
    """Reads that begin and end anywhere give the file's bytes, from the store and the cache."""
    for _ in range(2):
        assert joined(file.read(offset, length)) == WHOLE[offset : offset + length]


def test_windows_are_counted_where_they_were(file: StoredFile) -> None:
    """Zeros, chunk cache and store each have their windows and the time of the slowest."""
    file.read(0, 3 * WINDOW_BYTES)
    file.read(0, 3 * WINDOW_BYTES)
    file.read(2 * WINDOW_BYTES, WINDOW_BYTES)
    counted = file.counters
    assert (counted.reads, counted.zero, counted.cache, counted.store) == (3, 3, 2, 2)
    assert {name for name, seconds in counted.stalled_s.items() if seconds > 0} == {
        "zero",
        "cache",
        "store",
    }


def test_whoever_reads_hears_before_the_store_is_asked(file: StoredFile) -> None:
    """Zeros need nobody."""
    waits: list[int] = []
    file.read(2 * WINDOW_BYTES, WINDOW_BYTES, lambda: waits.append(1))
    assert not waits
    file.read(0, WINDOW_BYTES, lambda: waits.append(1))
    assert waits


def test_what_follows_comes_along(file: StoredFile, store: Ranges) -> None:
    """A window that a guest stands still for brings what lies behind it, in the same request.

    Not what was pushed.
    """
    file.note_pushed([4])
    assert joined(file.read(0, WINDOW_BYTES)) == WHOLE[:WINDOW_BYTES]
    file.fetcher.close()  # when all that came is kept
    assert file.fetcher.counters().chunks == 2
    file.read(WINDOW_BYTES, WINDOW_BYTES)
    file.read(5 * WINDOW_BYTES, WINDOW_BYTES)  # the same content
    assert (file.counters.store, file.counters.cache) == (1, 2)
    assert len(store.asked) == 1


def test_without_a_cache(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """A file works without a chunk cache, each read from the store."""
    file = file_of(put_pack(store, 1, CONTENTS), SIZE, store=store, fetcher=make_fetcher())
    assert joined(file.read(0, SIZE)) == joined(file.read(0, SIZE)) == WHOLE
    assert len(store.asked) == 2


def test_a_chunk_twice_in_a_file_comes_once(file: StoredFile, store: Ranges) -> None:
    """Windows of the same content cost one chunk."""
    file.read(0, SIZE)
    assert file.fetcher.counters().chunks == 4


def test_failure_sticks_and_names_the_window(file: StoredFile, store: Ranges) -> None:
    """After a window could not be had, reads that need the store fail at once, others do not."""
    file.read(4 * WINDOW_BYTES, WINDOW_BYTES)
    store.inject(Fault("get_range", "flip", times=None))
    with pytest.raises(OSError, match="window 1: object packs/"):
        file.read(WINDOW_BYTES, 2 * WINDOW_BYTES)
    assert pack_key(pack_id(1)) in file.failure
    asked = len(store.asked)
    with pytest.raises(OSError, match="window 1"):
        file.read(9 * WINDOW_BYTES, 1)
    assert len(store.asked) == asked
    assert joined(file.read(4 * WINDOW_BYTES, 9)) == WHOLE[4 * WINDOW_BYTES :][:9]
    assert joined(file.read(2 * WINDOW_BYTES, 9)) == bytes(9)


def test_trying_again(file: StoredFile, store: Ranges) -> None:
    """When the store is back and somebody opens the file anew, everything can be had."""
    store.inject(Fault("get_range", "missing"))
    with pytest.raises(OSError, match="window 0"):
        file.read(0, 1)
    file.try_again(lambda: pytest.fail("its map is here"))
    assert joined(file.read(0, SIZE)) == WHOLE
    assert file.failure.startswith("window 0")


def test_a_chunk_of_another_length(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """A window whose chunk does not fill it is an error that names both, not a short read."""
    entries = put_pack(store, 1, {0: window(0, 1000), 1: window(1)})
    file = file_of(entries, 2 * WINDOW_BYTES, store=store, fetcher=make_fetcher())
    with pytest.raises(OSError, match=r"window 0: object packs/.* 1000 bytes for a"):
        file.read(0, 100)
    assert "window 0" in file.failure


def test_a_map_that_is_on_its_way(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Reads wait for the map; one that cannot come fails them, and can come later."""
    entries = put_pack(store, 1, CONTENTS)
    arriving: concurrent.futures.Future[Content] = concurrent.futures.Future()
    file = StoredFile(SIZE, arriving, store, None, make_fetcher())
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = threads.submit(file.read, 0, 10)
        arriving.set_exception(StoreUnreachable("no answer"))
        with pytest.raises(OSError, match="window 0: no answer"):
            reading.result(60)
    later: concurrent.futures.Future[Content] = concurrent.futures.Future()
    file.try_again(lambda: later)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        reading = threads.submit(file.read, 0, SIZE)
        later.set_result(Content(map_of(entries, SIZE), DOMAIN))
        assert joined(reading.result(60)) == WHOLE


def test_files_of_a_mount(file: StoredFile) -> None:
    """A served file is read by its node; withdrawn it is stale; a failure is EIO."""
    files = ServedFiles()
    node = files.serve(("snapshots", "d", "memory"), file)
    assert files.serve(("snapshots", "d", "memory"), file) == node
    assert joined(files.read(node, SIZE - 10, 10, Call())) == WHOLE[-10:]  # type: ignore[arg-type]
    file.store.delete(pack_key(pack_id(1)))
    with pytest.raises(OSError, match=r"no object|window 4") as caught:
        files.read(node, 4 * WINDOW_BYTES, 10, Call())
    assert caught.value.errno == errno.EIO
    files.withdraw(node.parts)
    with pytest.raises(OSError, match="Stale") as caught:
        files.read(node, 0, 10, Call())
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(FileNotFoundError):
        files.withdraw(node.parts)


def test_a_local_file_knows_what_was_touched(tmp_path: Path) -> None:
    """The windows of a trial's reads, in the order of their first touch."""
    (tmp_path / "memory").write_bytes(WHOLE)
    file = LocalFile(tmp_path / "memory", SIZE)
    for offset, length in ((4 * WINDOW_BYTES, 1), (WINDOW_BYTES - 1, 2), (0, WINDOW_BYTES)):
        assert joined(file.read(offset, length)) == WHOLE[offset : offset + length]
    assert file.touched() == (4, 0, 1)
    file.close()
