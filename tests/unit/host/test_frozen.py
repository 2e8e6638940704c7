"""Copies that are begun while their source changes and finished while it stands still."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from torpor.errors import InternalError
from torpor.host import frozen, pagemap
from torpor.host.frozen import DiskCopy, MemoryCopy
from torpor.host.sparse import describe_sparse, punch_hole, unite, write_page_runs
from torpor.units import MiB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IN_LEVEL_1 = os.environ.get("TORPOR_LEVEL") == "1"
PAGE = pagemap.PAGE_BYTES
SIZE = 32 * MiB


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[tuple[Path, mmap.mmap]]:
    """A file that this process maps privately, and writes to here and there."""
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_WRITE | 1)
    with view:
        for number in range(2100):  # more than one call takes
            view[2 * number * PAGE] = 1
        yield path, view


@pytest.mark.parametrize(
    ("most_room", "more_pages"),
    [(0, 700), (3 * MiB + 1, 0), (3 * MiB + 1, 700), (256 * MiB, 0), (256 * MiB, 700)],
    ids=["no-room", "little-room", "little-room-more-pages", "room", "room-more-pages"],
)
def test_memory(
    memory: tuple[Path, mmap.mmap],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_room: int,
    more_pages: int,
) -> None:
    """What was written until the end is there, whatever room was made for it before."""
    path, view = memory
    monkeypatch.setattr(frozen, "_MOST_ROOM_BYTES", most_room)
    mapping = pagemap.find_mapping(os.getpid(), path)
    with MemoryCopy.begun(os.getpid(), mapping, tmp_path / "copy") as copy:
        if most_room:
            copy.make_room()
        for number in range(more_pages):
            view[SIZE - (2 * number + 1) * PAGE] = 2
            view[4 * number * PAGE] = 3
        pieces = copy.finish()
    runs = unite(pieces)
    assert runs == pagemap.find_written(os.getpid(), mapping)
    assert len(runs) == 2100 + more_pages
    again = 2 * more_pages if most_room and pagemap.tracks_writes() else more_pages
    assert len(pieces) == 2100 + again
    with path.open("r+b") as target, (tmp_path / "copy").open("rb") as source:
        write_page_runs(target.fileno(), pieces, source.fileno())
        assert len(source.read()) == sum(length for _, length in pieces)
    assert path.read_bytes() == bytes(view)


@pytest.mark.skipif(not pagemap.tracks_writes(), reason="this kernel tracks no writes")
def test_memory_that_goes_on(memory: tuple[Path, mmap.mmap], tmp_path: Path) -> None:
    """What a process writes once it runs again is none of the copy's business."""
    path, view = memory
    mapping = pagemap.find_mapping(os.getpid(), path)
    with MemoryCopy.begun(os.getpid(), mapping, tmp_path / "copy") as copy:
        copy.make_room()
        pieces = copy.finish()
        view[0] = view[PAGE] = 4
    assert len(pieces) == 2100


@pytest.mark.skipif(not pagemap.tracks_writes(), reason="this kernel tracks no writes")
def test_kernel_that_loses_marks(
    memory: tuple[Path, mmap.mmap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that was not copied ahead and counts as unwritten is no snapshot without it."""
    path, view = memory
    mapping = pagemap.find_mapping(os.getpid(), path)
    copying = contextlib.ExitStack()
    copy = copying.enter_context(MemoryCopy.begun(os.getpid(), mapping, tmp_path / "copy"))
    copy.make_room()
    view[PAGE] = 4
    copy.finish()
    monkeypatch.setattr(pagemap.Scanner, "find_clean", pagemap.Scanner.find)
    with pytest.raises(InternalError, match="counts as unwritten"):
        copying.close()


def test_what_the_kernel_tracks_is_found_out() -> None:
    """Whether it says which pages were written anew: Debian's, of level 1, does."""
    assert pagemap.tracks_writes() or not IN_LEVEL_1


def test_disk(tmp_path: Path) -> None:
    """A disk that nobody wrote to is done; another one gets what was written and discarded."""
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as stream:
        stream.truncate(16 * MiB)
    with source.open("r+b", buffering=0) as stream:
        for offset in (0, 5 * MiB, 9 * MiB):
            os.pwrite(stream.fileno(), os.urandom(MiB), offset)
        copy = DiskCopy(source, target)
        assert copy.is_done()
        os.pwrite(stream.fileno(), b"x", 5 * MiB + 7)
        assert not copy.is_done()
        os.pwrite(stream.fileno(), os.urandom(3 * MiB), 12 * MiB + 512)
        punch_hole(stream.fileno(), 9 * MiB, MiB // 2)
        os.pwrite(stream.fileno(), bytes(PAGE), 0)
    copy.finish()
    assert target.read_bytes() == source.read_bytes()
    assert describe_sparse(target) == describe_sparse(source)
    assert target.stat().st_blocks <= source.stat().st_blocks


def test_write_of_the_same_moment(tmp_path: Path) -> None:
    """A write is seen however soon after the copy it comes: no clock decides."""
    source = tmp_path / "source"
    source.write_bytes(b"a" * PAGE)
    with source.open("r+b", buffering=0) as stream:
        for number in range(100):
            copy = DiskCopy(source, tmp_path / f"target-{number}")
            os.pwrite(stream.fileno(), b"b", number)
            assert not copy.is_done()
