"""Copying the written memory of a paused VM: the same rule for every VMM under Linux."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.errors import VmmFailed
from torpor.host import pagemap
from torpor.vmm.interface import WrittenMemory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def copy_written_memory(
    pid: int, find: Callable[[int], pagemap.Mapping], data: Path
) -> WrittenMemory:
    """Copy all pages that a stopped process wrote to its guest memory to the new file `data`.

    `find` tells where in the process of that pid guest memory is. Blocking. Raises VmmFailed when
    the process ends, NoSpace.
    """
    try:
        mapping = find(pid)
        runs = pagemap.find_written(pid, mapping)
        with data.open("wb", buffering=0) as target:
            pagemap.copy_written(pid, mapping, runs, target.fileno())
    except (ProcessLookupError, FileNotFoundError) as error:
        raise VmmFailed(f"process {pid} ended during capture", reason=str(error)) from None
    return WrittenMemory(runs, data)
