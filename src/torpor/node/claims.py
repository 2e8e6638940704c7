"""Who may remove an instance: one task of one process at a time, when others have let go of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Final

from torpor.errors import Conflict
from torpor.host.lock import is_in_use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from torpor.node.journal_rows import InstanceRow
    from torpor.node.parts import Parts

CLAIM_WAIT_S: Final = 60.0
_REQUESTS_END_S: Final = 10.0
_RETRY_S: Final = 0.05


class Claims:
    """The claims of one process. Belongs to one asyncio loop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    @contextlib.asynccontextmanager
    async def removal(
        self, instance_id: str, *, wait_s: float = CLAIM_WAIT_S
    ) -> AsyncIterator[InstanceRow | None]:
        """The row as it was, during the body this task's alone to remove; None when it is gone.

        Raises Conflict when others, other tasks of this process too, are at work on it after
        `wait_s`. A cancellation loses no claim: what is to be undone is finished in the body.
        """
        deadline = time.monotonic() + wait_s
        while True:
            try:
                row = self._claim(instance_id)  # not in a thread: that could be cut off
                break
            except Conflict:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)
        try:
            yield row
        finally:
            if row is not None:
                self._parts.ending.discard(row.id)

    async def await_made(self, instance_id: str) -> None:
        """Wait while another task of this process makes it. Raises Conflict after a minute."""
        deadline = time.monotonic() + CLAIM_WAIT_S
        while instance_id in self._parts.making:
            if time.monotonic() >= deadline:
                raise Conflict(f"instance {instance_id} is still being made")
            await asyncio.sleep(_RETRY_S)

    async def await_answered(self, instance_id: str) -> None:
        """Wait while requests of `node.asking` are under way at a claimed instance, for 10 s."""
        deadline = time.monotonic() + _REQUESTS_END_S
        while is_in_use(self._parts.instances_dir / instance_id):
            if time.monotonic() >= deadline:
                return
            await asyncio.sleep(_RETRY_S)

    def _claim(self, instance_id: str) -> InstanceRow | None:
        if instance_id in self._parts.ending:
            raise Conflict(f"instance {instance_id} is being removed already")
        row = self._parts.journal.claim_stop(instance_id)
        if row is not None:
            self._parts.ending.add(instance_id)
        return row
