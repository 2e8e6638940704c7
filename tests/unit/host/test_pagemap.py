"""Written pages of a private mapping: found by both scans, copied byte by byte."""

from __future__ import annotations

import mmap
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from torpor.host import pagemap
from torpor.units import MiB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = pagemap.PAGE_BYTES
SIZE = 32 * MiB
LONG = (20 * MiB, 3 * MiB + PAGE)
"""A run that is longer than what one system call copies."""


@pytest.fixture
def written(tmp_path: Path) -> Iterator[tuple[Path, bytes, list[tuple[int, int]]]]:
    """A file that this process maps privately, what it sees there, and what of it it wrote."""
    path = tmp_path / "memory"
    path.write_bytes(os.urandom(SIZE))
    scattered = [(2 * number * PAGE, PAGE) for number in range(2100)]  # more than one call takes
    runs = [*scattered, LONG, (SIZE - PAGE, PAGE)]
    with path.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_WRITE | 1)
    with view:
        for offset, length in runs:
            view[offset : offset + length] = os.urandom(length)
        view[PAGE : PAGE + 1]  # read only: present, and the file's
        yield path, bytes(view), runs


def test_written_pages(written: tuple[Path, bytes, list[tuple[int, int]]], tmp_path: Path) -> None:
    """Just the written pages, as runs, with their bytes in order, many short and long ones."""
    path, seen, runs = written
    mapping = pagemap.find_mapping(os.getpid(), path)
    assert mapping.end - mapping.start == SIZE
    assert pagemap.find_written(os.getpid(), mapping) == runs
    with (tmp_path / "copy").open("wb") as target:
        pagemap.copy_written(os.getpid(), mapping, runs, target.fileno())
    copy = (tmp_path / "copy").read_bytes()
    assert copy == b"".join(seen[offset : offset + length] for offset, length in runs)


def test_reading_finds_the_same(written: tuple[Path, bytes, list[tuple[int, int]]]) -> None:
    """Kernels without the scan: page by page, the same pages."""
    path, _, runs = written
    mapping = pagemap.find_mapping(os.getpid(), path)
    pages = list(pagemap.scan_by_reading(os.getpid(), mapping))
    assert sum(last - first for first, last in pages) == sum(length for _, length in runs)
    assert pages[0] == (mapping.start, mapping.start + PAGE)


def test_process_that_ended(tmp_path: Path) -> None:
    """Memory of a process that is gone is a ProcessLookupError, never zeros."""
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    mapping = pagemap.Mapping(1 << 20, 2 << 20)
    with (tmp_path / "copy").open("wb") as target, pytest.raises(ProcessLookupError):
        pagemap.copy_written(ended.pid, mapping, [(0, PAGE)], target.fileno())


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    """Pages that nothing maps, as in a process that is ending, are a ProcessLookupError too."""
    with (tmp_path / "copy").open("wb") as target, pytest.raises(ProcessLookupError):
        pagemap.copy_written(os.getpid(), pagemap.Mapping(0, PAGE), [(0, PAGE)], target.fileno())
