"""Undo what dead commands left half done, and remove what belongs to nothing.

It looks only at what this home's journal, directories and slots name as torpor's own.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from torpor.errors import Conflict
from torpor.host.cancel import in_thread
from torpor.node.parts import log

if TYPE_CHECKING:
    from torpor.node.instance import Instances
    from torpor.node.journal import InstanceRow
    from torpor.node.parts import Parts


async def reconcile(parts: Parts, instances: Instances) -> list[str]:
    """Bring host and journal together; the ids of the instances that were removed."""
    removed = []
    for row in await in_thread(parts.journal.instances):
        if is_abandoned(row):
            try:
                await instances.destroy(row.id)
            except Conflict:
                continue  # another command is just doing the same
            log.warning("removed an abandoned instance id=%s state=%s", row.id, row.state)
            removed.append(row.id)
    await in_thread(_sweep, parts)
    return removed


def is_abandoned(row: InstanceRow) -> bool:
    """Whether nobody will ever finish or use this instance."""
    if row.state == "running":
        return row.vmm is None or not row.vmm.is_alive()
    return not row.owner.is_alive()


def _sweep(parts: Parts) -> None:
    # directories first: one that is made after the rows were read is not in the list
    directories = list(parts.instances_dir.iterdir())
    known = {row.id for row in parts.journal.instances()}
    for directory in directories:
        if directory.name not in known:
            shutil.rmtree(directory, ignore_errors=True)
    parts.slots.reclaim(parts.settings.home, known)
    parts.snapshots.sweep()
