"""Copies of what belongs to one instant, made so that the instant is short.

Each is begun while a process runs, which finds, opens and allocates everything and copies what it
can, and finished while the process stands still. Blocking; not for two threads at once.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Final

from torpor.errors import InternalError
from torpor.host import pagemap
from torpor.host.sparse import copy_sparse, patch_sparse, subtract

if TYPE_CHECKING:
    import array
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.host.sparse import Extent

_MORE_ROOM_BYTES: Final = 1 << 20
_MOST_ROOM_BYTES: Final = 256 << 20
_MADV_POPULATE_WRITE: Final = 23  # MAP_POPULATE maps a shared file's pages for reading only
_MARK_NS: Final = 10**18  # whole seconds, which every file system keeps


class MemoryCopy:
    """The pages that a process wrote in a private mapping, to be copied to a file.

    Where the kernel can tell which pages are written anew, all of them are copied ahead, and
    those once more in the end.
    """

    def __init__(self, pid: int, mapping: pagemap.Mapping, target: int) -> None:
        self._pid, self._mapping, self._target = pid, mapping, target
        self._scanner = pagemap.Scanner(pid, mapping)
        self._room: mmap.mmap | None = None
        self._filled = 0
        self._ahead: list[Extent] = []

    @classmethod
    @contextlib.contextmanager
    def begun(cls, pid: int, mapping: pagemap.Mapping, target: Path) -> Iterator[MemoryCopy]:
        """Open the new file `target`, which is complete at the end of the body.

        Raises OSError, ProcessLookupError or FileNotFoundError when the process is gone.
        """
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            copy = cls(pid, mapping, descriptor)
            stack.callback(copy._close)
            yield copy

    def make_room(self) -> None:
        """Allocate and map what `finish` will fill, as far as that can be known now."""
        tracked = pagemap.tracks_writes() and self._forget_writes()
        written = self._scanner.find()
        size = min(sum(written[1]) * 5 // 4 + _MORE_ROOM_BYTES, _MOST_ROOM_BYTES)
        os.posix_fallocate(self._target, 0, size)
        self._room = mmap.mmap(self._target, size, mmap.MAP_SHARED)
        with contextlib.suppress(OSError):  # Linux before 5.14: the pages come one by one
            self._room.madvise(_MADV_POPULATE_WRITE)
        if tracked:
            self._copy(*written)
            self._ahead = pagemap.join(*written)

    def finish(self) -> list[Extent]:
        """Copy what is not there yet; the process stands still.

        Returns runs of (offset, length): the target file has their bytes one after the other. They
        may overlap, and later ones are newer. Raises NoSpace, and ProcessLookupError or OSError
        when the process is gone.
        """
        written = self._scanner.find_dirty() if self._ahead else self._scanner.find()
        self._copy(*written)
        return [*self._ahead, *pagemap.join(*written)]

    def _forget_writes(self) -> bool:
        try:
            self._scanner.forget_writes()
        except PermissionError:
            return False
        return True

    def _copy(self, offsets: array.array[int], lengths: array.array[int]) -> None:
        """Append runs to the target: into the room, as far as it goes."""
        count = 0
        if self._room is not None:
            with memoryview(self._room) as room, room[self._filled :] as left:
                runs = offsets, lengths
                count, size = pagemap.read_runs(self._pid, self._mapping, runs, left)
                self._filled += size
        if count < len(offsets):
            rest = list(zip(offsets[count:], lengths[count:], strict=True))
            os.lseek(self._target, self._filled, os.SEEK_SET)
            pagemap.copy_written(self._pid, self._mapping, rest, self._target)
            self._filled += sum(lengths[count:])

    def _close(self) -> None:
        if self._room is not None:
            self._room.close()
            os.ftruncate(self._target, self._filled)
        try:
            if self._ahead:
                self._check_marks()
        finally:
            self._scanner.close()

    def _check_marks(self) -> None:
        """What the kernel counts as not written since has to be there; it may run again by now."""
        with contextlib.suppress(ProcessLookupError):
            clean = pagemap.join(*self._scanner.find_clean())
            if any(subtract(clean, self._ahead)):
                raise InternalError(f"process {self._pid} wrote to memory that counts as unwritten")


class DiskCopy:
    """A copy of a sparse file that another process writes to.

    A write sets the file's modification time, under the same lock as we do here: what was set and
    is still there says that nothing was written since, however coarse the file system's clock is.
    """

    def __init__(self, source: Path, target: Path) -> None:
        """Copy it as it is. Raises NoSpace."""
        self._source, self._target = source, target
        os.utime(source, ns=(_MARK_NS, _MARK_NS))
        copy_sparse(source, target)

    def is_done(self) -> bool:
        """Whether the copy is complete, now that nobody writes; without blocking."""
        return self._source.stat().st_mtime_ns == _MARK_NS

    def finish(self) -> None:
        """Copy what was written meanwhile; nobody writes now. Raises NoSpace."""
        patch_sparse(self._source, self._target)
