"""Sparse files: where their data is, copying, hashing and patching them without filling holes.

SEEK_DATA and SEEK_HOLE (lseek(2)), copy_file_range(2), FICLONE (ioctl_ficlone(2)), fallocate(2)
with FALLOC_FL_PUNCH_HOLE. Blocking; long loops stop at `host.cancel.checkpoint`.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import blake3

from torpor.host.cancel import checkpoint
from torpor.host.space import no_space_of
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

PAGE_BYTES: Final = 4096
_STEP_BYTES: Final = 8 * 1024 * 1024
_FICLONE: Final = 0x40049409
_PUNCH_HOLE_KEEP_SIZE: Final = 0x02 | 0x01
_ZERO_PAGE: Final = bytes(PAGE_BYTES)
_ZERO_STEP: Final = bytes(1024 * 1024)
_PATCH_STEP_BYTES: Final = 256 * 1024

_FAR: Final = 1 << 62

_libc = ctypes.CDLL(None, use_errno=True)

Extent = tuple[int, int]


@dataclass(frozen=True)
class SparseContent:
    """A file's length, where its non-zero pages are, and BLAKE3 over the bytes of those."""

    size_bytes: int
    extents: tuple[Extent, ...]
    digest: Digest


def data_extents(descriptor: int) -> list[Extent]:
    """(offset, length) of a file's data, page-aligned but for the file's end, not touching."""
    size = os.fstat(descriptor).st_size
    extents: list[Extent] = []
    position = 0
    while position < size:
        try:
            begin = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        end = min(os.lseek(descriptor, begin, os.SEEK_HOLE), size)
        begin -= begin % PAGE_BYTES
        end = min(end + -end % PAGE_BYTES, size)
        _append(extents, begin, end - begin)
        position = end
    return extents


def nonzero_extents(descriptor: int) -> list[Extent]:
    """Like `data_extents`, without the pages that hold only zeros."""
    extents: list[Extent] = []
    for offset, length in data_extents(descriptor):
        for begin, size in _steps(offset, length, len(_ZERO_STEP)):
            data = _read(descriptor, begin, size)
            if data == _ZERO_STEP[:size]:
                continue
            for page in range(0, size, PAGE_BYTES):
                piece = data[page : page + PAGE_BYTES]
                if piece != _ZERO_PAGE[: len(piece)]:
                    _append(extents, begin + page, len(piece))
    return extents


def is_zero_outside(path: Path, extents: Sequence[Extent]) -> bool:
    """Whether a file holds only zeros where no extent is; the extents ascend."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return not any(
            _read(descriptor, begin, size) != _ZERO_STEP[:size]
            for offset, length in subtract(data_extents(descriptor), extents)
            for begin, size in _steps(offset, length, len(_ZERO_STEP))
        )


def describe_sparse(path: Path) -> SparseContent:
    """Length, non-zero extents and digest of a file."""
    with _opened(path, os.O_RDONLY) as descriptor:
        extents = nonzero_extents(descriptor)
        size = os.fstat(descriptor).st_size
        return SparseContent(size, tuple(extents), _hash(descriptor, extents))


def hash_extents(path: Path, extents: Sequence[Extent]) -> Digest:
    """BLAKE3 over the bytes of the extents, one after the other."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return _hash(descriptor, extents)


def blake3_file(path: Path) -> Digest:
    """BLAKE3 over a whole file, holes read as zeros."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return _hash(descriptor, [(0, os.fstat(descriptor).st_size)])


def copy_sparse(source: Path, target: Path) -> int:
    """Copy a file with its holes to a new file; returns the data bytes.

    A reflink where the file system makes one. Raises NoSpace; no target is left on failure.
    """
    with _opened(source, os.O_RDONLY) as reader:
        try:
            with _opened(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as writer:
                return _copy(reader, writer)
        except FileExistsError:
            raise
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                target.unlink()
            raise no_space_of(error, target) from error


def fill_sparse(source: Path, target: Path) -> int:
    """Copy a file's data into one that is all holes, whoever has that open; returns its bytes.

    A reflink where the file system makes one. Raises NoSpace.
    """
    with _opened(source, os.O_RDONLY) as reader, _opened(target, os.O_WRONLY) as writer:
        try:
            return _copy(reader, writer)
        except OSError as error:
            raise no_space_of(error, target) from error


def copy_extents(source: Path, target: Path, *, size_bytes: int, extents: Sequence[Extent]) -> None:
    """Copy what lies in the extents to a new file of `size_bytes`, whose rest is holes.

    Raises NoSpace, OSError when the source cannot be read; no target is left on failure.
    """
    with _opened(source, os.O_RDONLY) as reader:
        try:
            with _opened(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as writer:
                os.ftruncate(writer, size_bytes)
                for offset, length in extents:
                    for begin, size in _steps(offset, length, len(_ZERO_STEP)):
                        write_at(writer, _read(reader, begin, size), begin)
        except FileExistsError:
            raise
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def patch_sparse(source: Path, target: Path) -> None:
    """Make a file that was copied by `copy_sparse` the same again. Raises NoSpace."""
    with _opened(source, os.O_RDONLY) as reader, _opened(target, os.O_RDWR) as writer:
        for offset, length in unite([*data_extents(reader), *data_extents(writer)]):
            for begin, size in _steps(offset, length, _PATCH_STEP_BYTES):
                data = _read(reader, begin, size)
                if data != _read(writer, begin, size):
                    _write_or_punch(writer, begin, data)


def write_page_runs(target: int, runs: Sequence[Extent], source: int) -> None:
    """Lay runs of pages, whose bytes follow each other in `source`, over a file.

    Pages that hold only zeros become holes. Raises NoSpace.
    """
    position = 0
    for offset, length in runs:
        for begin, size in _steps(offset, length, len(_ZERO_STEP)):
            data = _read(source, position, size)
            position += size
            _write_or_punch(target, begin, data)


def drop_page_cache(path: Path) -> None:
    """Write a file's dirty pages out and ask the kernel to forget its cached ones."""
    with _opened(path, os.O_RDONLY) as descriptor:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(reader: int, writer: int) -> int:
    size = os.fstat(reader).st_size
    extents = data_extents(reader)
    total = sum(length for _, length in extents)
    with contextlib.suppress(OSError):
        fcntl.ioctl(writer, _FICLONE, reader)
        return total
    os.ftruncate(writer, size)
    for offset, length in extents:
        _copy_range(reader, writer, offset, length)
    return total


def _copy_range(reader: int, writer: int, offset: int, length: int) -> None:
    while length:
        checkpoint()
        try:
            done = os.copy_file_range(reader, writer, min(length, _STEP_BYTES), offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
                raise
            done = os.pwrite(writer, _read(reader, offset, min(length, _STEP_BYTES)), offset)
        if done == 0:
            return
        offset, length = offset + done, length - done


def _hash(descriptor: int, extents: Sequence[Extent]) -> Digest:
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    for offset, length in extents:
        for begin, size in _steps(offset, length, _STEP_BYTES):
            hasher.update(_read(descriptor, begin, size))
    return Digest(hasher.hexdigest())


def _write_or_punch(target: int, offset: int, data: bytes) -> None:
    run_begin = 0
    for page in range(0, len(data) + PAGE_BYTES, PAGE_BYTES):
        piece = data[page : page + PAGE_BYTES]
        if piece and piece != _ZERO_PAGE[: len(piece)]:
            continue
        if page > run_begin:
            write_at(target, data[run_begin:page], offset + run_begin)
        if piece:
            punch_hole(target, offset + page, len(piece))
        run_begin = page + PAGE_BYTES


def write_at(target: int, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset of an open file. Raises NoSpace."""
    view = memoryview(data)
    while view:
        try:
            done = os.pwrite(target, view, offset)
        except OSError as error:
            raise no_space_of(error) from error
        view, offset = view[done:], offset + done


def punch_hole(target: int, offset: int, length: int) -> None:
    """Make a range of an open file zeros, without blocks where the file system can.

    Raises NoSpace.
    """
    result = _libc.fallocate(
        ctypes.c_int(target),
        ctypes.c_int(_PUNCH_HOLE_KEEP_SIZE),
        ctypes.c_int64(offset),
        ctypes.c_int64(length),
    )
    if result != 0:  # a file system without holes takes zeros
        write_at(target, bytes(length), offset)


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _steps(offset: int, length: int, step: int) -> Iterator[Extent]:
    for begin in range(offset, offset + length, step):
        checkpoint()
        yield begin, min(step, offset + length - begin)


def subtract(extents: Iterable[Extent], holes: Sequence[Extent]) -> Iterator[Extent]:
    """What of ascending extents lies in none of the ascending holes."""
    waiting = iter([*holes, (_FAR, 0)])
    hole, size = next(waiting)
    for offset, length in extents:
        place, end = offset, offset + length
        while place < end:
            while hole + size <= place:
                hole, size = next(waiting)
            if place < hole:
                yield place, min(hole, end) - place
            place = hole + size if hole < end else end


def unite(every: Iterable[Extent]) -> list[Extent]:
    """What lies in any of some extents, ascending, not touching."""
    extents: list[Extent] = []
    for offset, length in sorted(every):
        begin, end = extents.pop() if extents else (offset, 0)
        end += begin if end else offset
        if end < offset:
            extents.append((begin, end - begin))
            begin = offset
        extents.append((begin, max(end, offset + length) - begin))
    return extents


def _append(extents: list[Extent], offset: int, length: int) -> None:
    if extents and sum(extents[-1]) >= offset:
        extents[-1] = (extents[-1][0], offset + length - extents[-1][0])
    elif length:
        extents.append((offset, length))


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
