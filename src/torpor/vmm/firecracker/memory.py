"""The written memory of a Firecracker VM, by the two ways in which it has memory.

A restored VM maps its memory file privately: written pages are found by pagemap, as for every VMM.
A booted one has anonymous memory, in a mapping that Linux may join with others, so that nobody
outside can tell where it begins: its written pages are in the file of a Diff snapshot. Such a VM
has no parent, so it does no harm where a file system takes some zeros between them for data.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torpor.errors import NoSpace, VmmFailed
from torpor.host.sparse import data_extents
from torpor.vmm.interface import WrittenMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_STEP_BYTES = 1 << 20


def maps_file(pid: int, path: Path) -> bool:
    """Whether a process maps the file at `path`. False for a process that is gone."""
    wanted = path.stat()
    device = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}"
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(line.split()[3:5] == [device, str(wanted.st_ino)] for line in lines)


def copy_diff(opened: Callable[[], int], data: Path) -> WrittenMemory:
    """The pages in the memory file of a Diff snapshot, copied to the new file `data`. Blocking.

    Raises NoSpace, VmmFailed when the file that is to be opened went with its process.
    """
    try:
        descriptor = opened()
    except OSError as error:
        raise VmmFailed("Firecracker's memory file is gone", reason=str(error)) from None
    with open(descriptor, "rb") as source:
        runs = data_extents(source.fileno())
        try:
            with data.open("wb", buffering=0) as target:
                _copy_runs(source.fileno(), target.fileno(), runs)
        except OSError as error:
            raise NoSpace("memory could not be captured", reason=str(error)) from None
    return WrittenMemory(runs, data)


def _copy_runs(source: int, target: int, runs: Sequence[tuple[int, int]]) -> None:
    for offset, length in runs:
        end = offset + length
        while offset < end:
            piece = memoryview(os.pread(source, min(_STEP_BYTES, end - offset), offset))
            offset += len(piece)
            while piece:
                piece = piece[os.write(target, piece) :]
