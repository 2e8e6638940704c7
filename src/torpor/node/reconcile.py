"""Undo what dead commands left half done, and remove what belongs to nothing.

It looks only at what this home's journal, directories and slots name as torpor's own.
"""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from torpor.errors import Conflict, TorporError
from torpor.host.cancel import in_thread
from torpor.host.process import find_processes_in
from torpor.node.parts import log

if TYPE_CHECKING:
    from torpor.node.instance import Instances
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.paging import Paging
    from torpor.node.parts import Parts


async def reconcile(parts: Parts, instances: Instances, paging: Paging) -> list[str]:
    """Bring host and journal together; the ids of the instances that were removed.

    What dead pagers left has been cleared before.
    """
    removed = []
    for row in await in_thread(parts.journal.instances):
        with contextlib.suppress(Conflict):  # another command is just doing the same
            if is_abandoned(row) or await in_thread(_is_lost, paging, row):
                await instances.destroy(row.id, wait_s=0)
                log.warning("removed an abandoned instance id=%s state=%s", row.id, row.state)
                removed.append(row.id)
            elif row.capturer is not None and not row.capturer.is_alive():
                await _thaw(instances, row)
    await in_thread(_sweep, parts)
    return removed


async def _thaw(instances: Instances, row: InstanceRow) -> None:
    try:
        await instances.thaw(row)
    except TorporError as error:  # no reason for other commands to fail
        log.warning("instance may be paused id=%s error=%s", row.id, error)
    else:
        log.warning("resumed an instance whose snapshot was cut off id=%s", row.id)


def is_abandoned(row: InstanceRow) -> bool:
    """Whether nobody will ever finish, use or end this instance."""
    if row.state == "running":
        kept = row.keeper is None or row.keeper.is_alive()
        return row.vmm is None or not row.vmm.is_alive() or not kept
    return not row.owner.is_alive()


def _is_lost(paging: Paging, row: InstanceRow) -> bool:
    """While a command makes or removes an instance, that command is told of its VM's end."""
    return row.state == "running" and paging.has_lost_memory(row)


def _sweep(parts: Parts) -> None:
    # directories first: one that is made after the rows were read is not in the list
    directories = list(parts.instances_dir.iterdir())
    known = {row.id for row in parts.journal.instances()}
    for directory in directories:
        if directory.name not in known:
            for process in find_processes_in(directory):
                process.kill()
            shutil.rmtree(directory, ignore_errors=True)
    parts.slots.reclaim(parts.settings.home, known)
    parts.snapshots.sweep()
