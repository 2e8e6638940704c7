"""Copying the written memory of a paused VM: the same rule for every VMM under Linux."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torpor.errors import VmmFailed
from torpor.host import pagemap
from torpor.host.frozen import MemoryCopy
from torpor.vmm.interface import WrittenMemory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class WrittenCopy:
    """All pages that a process wrote to its guest memory, to be copied to the new file `data`.

    Blocking. Raises VmmFailed when the process ends, NoSpace.
    """

    def __init__(self, pid: int, copy: MemoryCopy, data: Path) -> None:
        self._pid, self._copy, self.data = pid, copy, data

    @classmethod
    @contextlib.contextmanager
    def begun(cls, pid: int, memory: Path, data: Path) -> Iterator[WrittenCopy]:
        """Find the private mapping of the file `memory`; after the body everything is closed."""
        with contextlib.ExitStack() as stack:
            with _told(pid):
                mapping = pagemap.find_mapping(pid, memory)
                copy = stack.enter_context(MemoryCopy.begun(pid, mapping, data))
            yield cls(pid, copy, data)

    def make_room(self) -> None:
        """While the process runs: have memory for what it wrote until now."""
        with _told(self._pid):
            self._copy.make_room()

    def finish(self) -> WrittenMemory:
        """Copy; the process stands still."""
        with _told(self._pid):
            return WrittenMemory(self._copy.finish(), self.data)


def copy_written_memory(pid: int, memory: Path, data: Path) -> WrittenMemory:
    """All of a WrittenCopy at once."""
    with WrittenCopy.begun(pid, memory, data) as copy:
        return copy.finish()


@contextlib.contextmanager
def _told(pid: int) -> Iterator[None]:
    try:
        yield
    except (ProcessLookupError, FileNotFoundError) as error:
        raise VmmFailed(f"process {pid} ended during capture", reason=str(error)) from None
