"""Instances that stand still since they found the disk full: let go on, or told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from torpor.errors import NoSpace, TorporError
from torpor.host.cancel import in_thread
from torpor.host.space import is_full
from torpor.node.parts import log

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torpor.node.instance import Instances
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.parts import Parts

LITTLE_BYTES: Final = 16 * 1024**2
"""With less room than this a disk may have been full a moment ago, or be so in a moment."""

_LOOK_S: Final = 5.0
_SUSPECTS: Final = 4
_HINT: Final = "free some space: the daemon, or the next command, then lets it go on"


class Suspects:
    """Which instances may stand still though nobody has seen the disk full: it was so briefly.

    Their VMMs have used no processor since the last look; each is suspected once for that.
    """

    def __init__(self) -> None:
        self._ticks: dict[str, int] = {}
        self._asked: dict[str, int] = {}

    def find(self, rows: Sequence[InstanceRow]) -> list[InstanceRow]:
        """At most a few of the running ones; the others at the next looks."""
        found: list[InstanceRow] = []
        ticks = {row.id: row.vmm.cpu_ticks() for row in rows if row.vmm and _is_idle(row)}
        self._asked = {each: at for each, at in self._asked.items() if ticks.get(each) == at}
        for row in rows:
            now = ticks.get(row.id)
            if now is None or now != self._ticks.get(row.id) or row.id in self._asked:
                continue
            if len(found) < _SUSPECTS:
                found.append(row)
                self._asked[row.id] = now
        self._ticks = ticks
        return found

    def forget(self, instance_ids: Collection[str]) -> None:
        """These could not be asked: they are suspected again."""
        for instance_id in instance_ids:
            self._asked.pop(instance_id, None)


async def revive(
    parts: Parts, instances: Instances, *, only: Sequence[InstanceRow] | None = None
) -> set[str]:
    """Let instances go on that found the disk full, if there is room; else say that they do not.

    All of them are asked, or `only` some. Those that could not be, as another command is at work
    on them.
    """
    if is_full(parts.instances_dir):
        for instance_id in await find_stalled(parts, instances):
            parts.reporter.say(f"instance {instance_id} stands still: it found the disk full")
            parts.reporter.say(_HINT)
        return set()
    rows = await in_thread(parts.journal.instances) if only is None else only
    rows = [row for row in rows if _is_idle(row)]
    asked = await asyncio.gather(*(_revive(parts, instances, row) for row in rows))
    return {row.id for row, was_asked in zip(rows, asked, strict=True) if not was_asked}


async def find_stalled(parts: Parts, instances: Instances) -> set[str]:
    """The instances that stand still: they answer nothing.

    Looked for only while the disk is full; once there is room `revive` lets them go on.
    """
    if not is_full(parts.instances_dir, below_bytes=LITTLE_BYTES):
        return set()
    rows = [row for row in await in_thread(parts.journal.instances) if _is_idle(row)]
    stalled = await asyncio.gather(*(_stands_still(instances, row) for row in rows))
    return {row.id for row, stands in zip(rows, stalled, strict=True) if stands}


async def check_goes_on(parts: Parts, instances: Instances, instance_id: str) -> None:
    """Raise NoSpace for an instance that stands still, as `find_stalled` finds them."""
    if instance_id in await find_stalled(parts, instances):
        raise NoSpace(
            f"instance {instance_id} stands still", reason="it found the disk full", hint=_HINT
        )


def _is_idle(row: InstanceRow) -> bool:
    return row.state == "running" and row.capturer is None


async def _stands_still(instances: Instances, row: InstanceRow) -> bool:
    try:
        async with asyncio.timeout(_LOOK_S):
            return await instances.stands_still(row)
    except (TorporError, TimeoutError) as error:
        log.warning("instance may stand still id=%s error=%s", row.id, error)
        return False


async def _revive(parts: Parts, instances: Instances, row: InstanceRow) -> bool:
    """Whether it could be asked."""
    try:
        async with asyncio.timeout(_LOOK_S):
            if await instances.revive(row):
                log.warning("instance goes on, there is room again id=%s", row.id)
                parts.reporter.say(f"instance {row.id} had found the disk full; it goes on now")
    except (TorporError, TimeoutError) as error:
        log.warning("instance may stand still id=%s error=%s", row.id, error)
        return False
    return True
