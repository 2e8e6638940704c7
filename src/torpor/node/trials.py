"""Trials of a snapshot: woken as a proof that it wakes, and to learn which windows it touches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.node.parts import log
from torpor.pager.trial import merge

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from torpor.node.instance import Instances
    from torpor.node.live import Instance
    from torpor.node.paging import Files, Paging
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.windows import Touched

    Use = Callable[[Instance], Awaitable[object]]

_TRIALS: Final = 2


class Trials:
    """Makes trials on one node. Belongs to one asyncio loop."""

    def __init__(self, instances: Instances, paging: Paging) -> None:
        self._instances = instances
        self._paging = paging

    async def run(self, snapshot: LocalSnapshot, use: Use) -> tuple[Touched, ...] | None:
        """Wake a snapshot twice, `use` each instance, keep which windows they touched, in order.

        The trials' files come from a cold mount; without FUSE they are the snapshot's own, it is
        woken once and nothing is learnt: None. The caller holds the files lock. Raises what
        restoring and `use` raise; nothing is left of the instances.
        """
        trials = []
        try:
            for _ in range(_TRIALS):
                async with entered_in_thread(self._paging.trial(snapshot)) as (trial, files):
                    await self._wake_once(snapshot, files, use)
                    trials.append(trial.touched())
        except HostUnfit as error:
            log.warning("no working set is recorded: %s", error)
            await self._wake_once(snapshot, None, use)
            return None
        touched = merge(trials)
        await in_thread(snapshot.record_working_set, touched)
        return touched

    async def _wake_once(self, snapshot: LocalSnapshot, files: Files | None, use: Use) -> None:
        instance = await self._instances.restore(snapshot, files=files)
        try:
            await use(instance)
        finally:
            await self._instances.destroy(instance.id, vmm=instance.vmm)
