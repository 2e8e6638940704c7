"""The chunk cache: bounded, least recently used goes first, never wrong bytes, never an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.paged import DOMAIN, window
from torpor.errors import Conflict
from torpor.pager.cache import ChunkCache, open_or_none
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOTS = 4
CONTENTS = [window(number, WINDOW_BYTES - number) for number in range(10)]
IDS = [DOMAIN.chunk_id(content) for content in CONTENTS]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ChunkCache]:
    """A cache of four windows."""
    made = ChunkCache(tmp_path / "cache", capacity_bytes=SLOTS * WINDOW_BYTES)
    yield made
    made.close()


def put(cache: ChunkCache, *numbers: int) -> None:
    """Keep chunks by number."""
    for number in numbers:
        cache.put(IDS[number], CONTENTS[number])


def here(cache: ChunkCache, numbers: range = range(len(IDS))) -> list[int]:
    """Which chunks seem to be here."""
    return [number for number in numbers if cache.has(IDS[number])]


def get(cache: ChunkCache, number: int) -> bool:
    """Whether a chunk is here; if it is, with the right bytes."""
    found = cache.get([IDS[number]]).get(IDS[number])
    assert found in (None, CONTENTS[number])
    return found is not None


def test_least_recently_used_goes_first(cache: ChunkCache) -> None:
    """Reading counts as use, looking whether it is here does not."""
    put(cache, 0, 1, 2, 3)
    assert get(cache, 0)
    assert cache.has(IDS[1])
    put(cache, 4, 5)
    assert here(cache) == [0, 3, 4, 5]
    counted = cache.counters()
    assert (counted.hits, counted.misses, counted.evicted, counted.chunks) == (1, 0, 2, SLOTS)


def test_never_larger_than_its_capacity(cache: ChunkCache, tmp_path: Path) -> None:
    """However many chunks come, and twice, the file has room for its slots alone."""
    put(cache, *range(10), *range(10))
    assert len(here(cache)) == SLOTS
    assert (tmp_path / "cache" / "slots").stat().st_size == SLOTS * WINDOW_BYTES


def test_protected_ones_stay(cache: ChunkCache) -> None:
    """What is protected outlives what is not, also if it comes after its protection."""
    cache.protect(IDS[0] + IDS[9])
    put(cache, 0, 1, 2, 3, 9, 4, 5, 6)
    assert here(cache) == [0, 5, 6, 9]
    cache.protect(IDS[0])
    cache.unprotect(IDS[0] + IDS[9])
    put(cache, 1, 2, 3, 4)
    assert 0 in here(cache)
    assert 9 not in here(cache)
    cache.unprotect(IDS[0])
    put(cache, 5, 6, 7, 8)
    assert here(cache) == [5, 6, 7, 8]
    assert cache.counters().protected == 0


def test_nothing_but_protected_ones(cache: ChunkCache) -> None:
    """A new chunk is not kept when all room is protected, and is kept when room was made."""
    cache.protect(b"".join(IDS[:SLOTS]))
    put(cache, 0, 1, 2, 3, 4)
    assert here(cache) == [0, 1, 2, 3]
    cache.unprotect(IDS[2])
    put(cache, 5)
    assert here(cache) == [0, 1, 3, 5]


def damage(cache_dir: Path, name: str, offset: int) -> None:
    """Flip a bit."""
    with (cache_dir / name).open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("is_told_by_the_kernel", [True, False])
def test_whoever_reads_hears_before_the_disk_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, is_told_by_the_kernel: bool
) -> None:
    """Not for what the page cache has, where the file system tells (tmpfs does not)."""
    waits: list[int] = []
    ids = [IDS[number] for number in (0, 1)]

    def contents() -> list[memoryview]:
        waits.clear()
        found = cache.get(ids, lambda: waits.append(1))
        return [found[chunk_id] for chunk_id in ids]

    with tempfile.TemporaryDirectory() as name:  # on disk, unlike those of many tests
        cache = ChunkCache(Path(name), capacity_bytes=SLOTS * WINDOW_BYTES)
        put(cache, 0, 2, 1)  # in two runs: 0, and 1 behind 2
        if not is_told_by_the_kernel:
            monkeypatch.setattr(os, "RWF_NOWAIT", 1 << 30)  # no such flag: EOPNOTSUPP
        elif not _tells_what_is_in_memory(Path(name)):
            pytest.skip("this file system does not tell what is in the page cache")
        else:
            assert contents() == CONTENTS[:2]
            assert not waits
        for _ in range(100):  # a page that the kernel is busy with stays
            _forget(Path(name, "slots"))
            assert contents() == CONTENTS[:2]
            if waits:
                break
        assert waits
        cache.close()


def _forget(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    with path.open("rb") as stream:
        os.fsync(stream)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _tells_what_is_in_memory(directory: Path) -> bool:
    path = directory / "probe"
    path.write_bytes(bytes(4096))
    with path.open("rb") as stream:
        try:
            return os.preadv(stream.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
        except OSError:
            return False


def test_a_flipped_bit_is_a_miss_once(cache: ChunkCache, tmp_path: Path) -> None:
    """Damage is found by reading; the chunk is forgotten and can be kept again."""
    put(cache, 0, 1)
    damage(tmp_path / "cache", "slots", 100)
    assert not get(cache, 0)
    assert cache.counters().damaged == 1
    assert get(cache, 1)
    put(cache, 0)
    assert get(cache, 0)


@pytest.mark.parametrize("name", ["slots", "table"])
def test_cut_while_in_use(cache: ChunkCache, tmp_path: Path, name: str) -> None:
    """Files that another program truncates cost fetches, not the process."""
    put(cache, 0, 1)
    os.truncate(tmp_path / "cache" / name, 0)
    get(cache, 0)
    put(cache, 2, 3, 4, 5, 6)
    assert [get(cache, number) for number in (4, 5, 6)] == [True] * 3


def test_deleted_while_in_use(cache: ChunkCache, tmp_path: Path) -> None:
    """A cache whose directory is gone serves what it has and takes what comes."""
    put(cache, 0, 1)
    shutil.rmtree(tmp_path / "cache")
    put(cache, 2)
    assert [get(cache, number) for number in (0, 1, 2)] == [True] * 3


def test_another_process_has_it(cache: ChunkCache, tmp_path: Path) -> None:
    """Two processes never share a cache; it is free when the first lets go."""
    with pytest.raises(Conflict, match="another process"):
        ChunkCache(tmp_path / "cache", capacity_bytes=WINDOW_BYTES)
    put(cache, 0)
    successor = ChunkCache(
        tmp_path / "cache", capacity_bytes=SLOTS * WINDOW_BYTES, predecessor_died=True
    )
    assert get(successor, 0)
    successor.close()


def test_content_outlives_a_restart(cache: ChunkCache, tmp_path: Path) -> None:
    """What was kept is there again, in the order in which it came, and is replaced in that."""
    put(cache, 0, 1, 2, 3, 4)
    again = ChunkCache(
        tmp_path / "cache", capacity_bytes=SLOTS * WINDOW_BYTES, predecessor_died=True
    )
    assert [get(again, number) for number in range(6)] == [False, True, True, True, True, False]
    again.close()
    again = ChunkCache(
        tmp_path / "cache", capacity_bytes=SLOTS * WINDOW_BYTES, predecessor_died=True
    )
    put(again, 5)
    assert here(again) == [2, 3, 4, 5]
    again.close()


def test_another_capacity(tmp_path: Path) -> None:
    """A smaller cache keeps what lies in its slots, a larger one all."""
    for slots, expected in ((4, []), (2, [0, 1]), (8, [0, 1])):
        cache = ChunkCache(tmp_path, capacity_bytes=slots * WINDOW_BYTES)
        assert [number for number in range(4) if get(cache, number)] == expected
        put(cache, 0, 1, 2, 3)
        if slots == 2:
            put(cache, 0, 1)
        cache.close()


@pytest.mark.parametrize("name", ["slots", "table"])
def test_foreign_files(tmp_path: Path, name: str) -> None:
    """Whatever stands in the files at the beginning, nothing wrong comes out and it works on."""
    (tmp_path / name).write_bytes(os.urandom(3 * WINDOW_BYTES))
    cache = ChunkCache(tmp_path, capacity_bytes=SLOTS * WINDOW_BYTES)
    assert not any(get(cache, number) for number in range(10))
    put(cache, *range(10))
    assert sum(get(cache, number) for number in range(10)) == SLOTS
    cache.close()


def test_a_table_that_lies(tmp_path: Path) -> None:
    """Entries of right form with wrong slots are found out one by one."""
    cache = ChunkCache(tmp_path, capacity_bytes=SLOTS * WINDOW_BYTES)
    put(cache, 0, 1)
    cache.close()
    table = bytearray((tmp_path / "table").read_bytes())
    table[0:64], table[64:128] = table[64:128], table[0:64]
    (tmp_path / "table").write_bytes(table)
    cache = ChunkCache(tmp_path, capacity_bytes=SLOTS * WINDOW_BYTES)
    assert not get(cache, 0)
    assert not get(cache, 1)
    assert cache.counters().damaged == 2
    put(cache, 0, 1)
    assert get(cache, 0)
    cache.close()


def test_an_entry_that_was_written_in_parts(tmp_path: Path) -> None:
    """An id beside the length, age and check of what its slot held before is found out."""
    cache = ChunkCache(tmp_path, capacity_bytes=SLOTS * WINDOW_BYTES)
    put(cache, 0)
    cache.close()
    with (tmp_path / "table").open("r+b") as table:
        table.write(IDS[1])
    cache = ChunkCache(tmp_path, capacity_bytes=SLOTS * WINDOW_BYTES)
    assert here(cache) == [1]
    assert not get(cache, 1)
    assert cache.counters().damaged == 1
    cache.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from torpor.pager.cache import ChunkCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = ChunkCache(Path(sys.argv[1]), capacity_bytes=4 * 16384)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
for number in range(6):
    cache.put(bytes([number]) * 32, bytes([number]) * 16384)
here = [number for number in range(6) if cache.get([bytes([number]) * 32])]
print(here, cache.counters().failures > 0, cache.counters().chunks)
"""


def test_no_room_on_the_disk(tmp_path: Path) -> None:
    """What cannot be written is not kept; what was written before is."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[0] True 1\n"


def test_a_cache_that_cannot_be_opened(tmp_path: Path) -> None:
    """Where the directory cannot be made there is none, and the pager works without."""
    (tmp_path / "file").write_bytes(b"")
    assert open_or_none(tmp_path / "file" / "cache", capacity_bytes=WINDOW_BYTES) is None


def test_many_threads(cache: ChunkCache) -> None:
    """Whatever threads keep, read and evict at once, nobody gets another's bytes."""
    start = threading.Barrier(4)

    def work(seed: int) -> int:
        start.wait()
        found = 0
        for step in range(300):
            number = (seed * 7 + step * 3) % 10
            put(cache, number)
            found += get(cache, number)
        return found

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 0
    assert cache.counters().chunks <= SLOTS
    assert cache.counters().failures == 0
