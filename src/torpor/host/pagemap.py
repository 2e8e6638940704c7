"""Which pages of a private file mapping were written since the mapping was made, and their bytes.

A page of a MAP_PRIVATE file mapping that is present (or swapped) and not file-backed is a copy that
a write made (Documentation/admin-guide/mm/pagemap.rst in the kernel tree). Two ways to learn it:
the PAGEMAP_SCAN ioctl of Linux 6.7, which walks only what is there, and reading
/proc/PID/pagemap, eight bytes for each page of the mapping.
"""

from __future__ import annotations

import array
import bisect
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import operator
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.errors import InternalError, NoSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES: Final = mmap.PAGESIZE

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), include/uapi/linux/fs.h
_IS_FILE = 1 << 2
_IS_PRESENT = 1 << 3
_IS_SWAPPED = 1 << 4
_IS_DIRTY = 1 << 7
_REGIONS_A_CALL = 4096

_ENTRY_PRESENT = 1 << 63
_ENTRY_SWAPPED = 1 << 62
_ENTRY_FILE = 1 << 61

_COPY_BYTES = 1 << 20
_PIECES_A_CALL = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong),
    ctypes.c_ulong,
)


class _ScanArgument(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


@dataclass(frozen=True)
class Mapping:
    """One contiguous private mapping of a whole file: addresses in the process, bytes."""

    start: int
    end: int


def find_mapping(pid: int, path: Path) -> Mapping:
    """Where a process maps the file at `path`, all its pieces joined.

    QEMU's madvise calls may split one mapping into several adjacent areas. Raises InternalError if
    the file is not mapped privately from its beginning in one piece.
    """
    wanted = path.stat()
    file = f" {os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x} {wanted.st_ino} "
    start = end = 0
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if file not in line:
            continue
        span, mode, offset = line.split(maxsplit=3)[:3]
        first, last = (int(number, 16) for number in span.split("-"))
        if start == 0:
            start = end = first
        if mode[3] != "p" or first != end or int(offset, 16) != first - start:
            raise InternalError(f"{path} is not one private mapping in process {pid}", reason=line)
        end = last
    if start == 0:
        raise InternalError(f"process {pid} does not map {path}")
    return Mapping(start, end)


@functools.lru_cache(maxsize=1)
def has_scan_ioctl() -> bool:
    """Whether this kernel has PAGEMAP_SCAN."""
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        argument = _ScanArgument(size=ctypes.sizeof(_ScanArgument))
        try:
            fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        except OSError as error:
            return error.errno not in (errno.ENOTTY, errno.EINVAL)
    return True


@functools.lru_cache(maxsize=1)
def tracks_writes() -> bool:
    """Whether this kernel tells which pages were written since `Scanner.forget_writes`.

    It has to be built with CONFIG_MEM_SOFT_DIRTY (Debian's are), and to report that
    by PAGEMAP_SCAN: pages of a new area count as written until they are forgotten.
    """
    if not has_scan_ioctl():
        return False
    with mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        view = (ctypes.c_char * PAGE_BYTES).from_buffer(page)
        start = ctypes.addressof(view)
        del view
        scanner = Scanner(os.getpid(), Mapping(start, start + PAGE_BYTES))
        try:
            dirty, _ = scanner.find_dirty()
        except OSError:  # it has no such category
            return False
        finally:
            scanner.close()
    return bool(dirty)


class Scanner:
    """Finds the written pages of one mapping, as often as it is asked; everything is open before.

    Raises ProcessLookupError or FileNotFoundError when the process is gone.
    """

    def __init__(self, pid: int, mapping: Mapping) -> None:
        self._pid, self._mapping = pid, mapping
        self._has_scan = has_scan_ioctl()
        self._words = array.array("Q", bytes(_REGIONS_A_CALL * 24))  # start, end, categories
        self._descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Free the descriptor."""
        os.close(self._descriptor)

    def forget_writes(self) -> None:
        """Let `find_dirty` find what is written from now on. Costs the process a fault a page.

        Raises OSError without the right to it.
        """
        Path(f"/proc/{self._pid}/clear_refs").write_bytes(b"4")

    def find(self) -> tuple[array.array[int], array.array[int]]:
        """Offsets and lengths in bytes of all written runs, ascending; they may touch."""
        if self._has_scan:
            return self._scan(_IS_FILE)
        spans = list(_read_spans(self._descriptor, self._mapping))
        starts, ends = (array.array("Q", (span[end] for span in spans)) for end in (0, 1))
        return self._relative(starts, ends)

    def find_dirty(self) -> tuple[array.array[int], array.array[int]]:
        """Like `find`, what was written since `forget_writes`. Only where `tracks_writes`."""
        return self._scan(_IS_FILE, and_have=_IS_DIRTY)

    def find_clean(self) -> tuple[array.array[int], array.array[int]]:
        """Like `find`, what was not written since `forget_writes`. Only where `tracks_writes`."""
        return self._scan(_IS_FILE | _IS_DIRTY)

    def _relative(
        self, starts: array.array[int], ends: array.array[int]
    ) -> tuple[array.array[int], array.array[int]]:
        offsets = array.array("Q", map(operator.sub, starts, itertools.repeat(self._mapping.start)))
        return offsets, array.array("Q", map(operator.sub, ends, starts))

    def _scan(self, lack: int, and_have: int = 0) -> tuple[array.array[int], array.array[int]]:
        """Runs of pages that are there, have none of some categories, and others."""
        words, end = self._words, self._mapping.end
        argument = _ScanArgument(
            size=ctypes.sizeof(_ScanArgument),
            start=self._mapping.start,
            end=end,
            vec=words.buffer_info()[0],
            vec_len=_REGIONS_A_CALL,
            category_inverted=lack,
            category_mask=lack | and_have,
            category_anyof_mask=_IS_PRESENT | _IS_SWAPPED,
            return_mask=_IS_PRESENT | _IS_SWAPPED,
        )
        found = array.array("Q")
        while argument.start < end:
            count = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument)
            found += words[: 3 * count]
            # Linux (6.18 too) leaves an old walk_end when it comes to the end in several rounds
            argument.start = max(argument.walk_end, found[-2]) if count else end
        return self._relative(found[::3], found[1::3])


def find_written(pid: int, mapping: Mapping) -> list[tuple[int, int]]:
    """(offset, length) in bytes of all written runs of a mapping, ascending, not touching."""
    scanner = Scanner(pid, mapping)
    try:
        return join(*scanner.find())
    finally:
        scanner.close()


def join(offsets: array.array[int], lengths: array.array[int]) -> list[tuple[int, int]]:
    """(offset, length) of ascending runs, those that touch as one."""
    spans = zip(offsets, lengths, strict=True)
    ends = map(operator.add, offsets, lengths)
    if not any(map(operator.eq, ends, offsets[1:])):  # as the kernel's scan gives them mostly
        return list(spans)
    runs: list[tuple[int, int]] = []
    for offset, length in spans:
        if runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((offset, length))
    return runs


def read_runs(
    pid: int, mapping: Mapping, runs: tuple[array.array[int], array.array[int]], room: memoryview
) -> tuple[int, int]:
    """Copy the first of a stopped process's runs to memory, as many as there is room for.

    Returns how many, and their bytes, which follow each other there. Raises as `copy_written`.
    """
    offsets, lengths = runs
    ends = array.array("Q", itertools.accumulate(lengths, initial=0))
    count = bisect.bisect_right(ends, len(room)) - 1
    pieces = array.array("Q", bytes(16 * count))
    pieces[::2] = array.array(
        "Q", map(operator.add, offsets[:count], itertools.repeat(mapping.start))
    )
    pieces[1::2] = lengths[:count]
    for first in range(0, count, _PIECES_A_CALL):
        last = min(first + _PIECES_A_CALL, count)
        begin, end = ends[first], ends[last]
        _read_memory(pid, pieces[2 * first : 2 * last], room[begin:end], end - begin)
    return count, ends[count]


def copy_written(pid: int, mapping: Mapping, runs: list[tuple[int, int]], target: int) -> None:
    """Append the bytes of `runs` of a stopped process to the open file `target`.

    Raises NoSpace, and ProcessLookupError or OSError when the process ends meanwhile.
    """
    buffer = bytearray(_COPY_BYTES)
    for pieces, filled in _batches(runs, mapping.start):
        _read_memory(pid, pieces, buffer, filled)
        _write_all(target, memoryview(buffer)[:filled])


def _batches(runs: list[tuple[int, int]], start: int) -> Iterator[tuple[array.array[int], int]]:
    """Runs in pieces of one system call: addresses and lengths in turn, and the sum of lengths."""
    pieces, filled = array.array("Q"), 0
    for offset, length in runs:
        position, left = start + offset, length
        while left:
            size = min(left, _COPY_BYTES - filled)
            pieces.extend((position, size))
            position, left, filled = position + size, left - size, filled + size
            if filled == _COPY_BYTES or len(pieces) == 2 * _PIECES_A_CALL:
                yield pieces, filled
                pieces, filled = array.array("Q"), 0
    if filled:
        yield pieces, filled


def _read_memory(
    pid: int, pieces: array.array[int], buffer: bytearray | memoryview, size: int
) -> None:
    """Read all pieces of another process's memory, see process_vm_readv(2)."""
    view = (ctypes.c_char * size).from_buffer(buffer)
    into = array.array("Q", (ctypes.addressof(view), size))
    got = _libc.process_vm_readv(
        *(pid, into.buffer_info()[0], 1, pieces.buffer_info()[0], len(pieces) // 2, 0)
    )
    if got == -1:
        number = ctypes.get_errno()
        if number != errno.EFAULT:
            raise OSError(number, os.strerror(number))
    if got != size:  # its pages go while it ends
        raise ProcessLookupError(errno.ESRCH, f"memory of process {pid} is gone")


def _write_all(target: int, data: memoryview) -> None:
    try:
        while data:
            data = data[os.write(target, data) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the disk is full, memory could not be captured") from None
        raise


def scan_by_reading(pid: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    """Address ranges of written pages, read from /proc/PID/pagemap: for kernels before 6.7."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        yield from _read_spans(pagemap.fileno(), mapping)


def _read_spans(pagemap: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    entries = array.array(
        "Q",
        os.pread(
            pagemap,
            (mapping.end - mapping.start) // PAGE_BYTES * 8,
            mapping.start // PAGE_BYTES * 8,
        ),
    )
    for index, entry in enumerate(entries):
        if entry & (_ENTRY_PRESENT | _ENTRY_SWAPPED) and not entry & _ENTRY_FILE:
            address = mapping.start + index * PAGE_BYTES
            yield address, address + PAGE_BYTES
