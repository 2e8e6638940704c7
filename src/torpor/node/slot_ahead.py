"""A slot that is made while its instance's snapshot is still being opened in the store."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from torpor.errors import TorporError
from torpor.host.cancel import in_thread
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from torpor.net.registry import Slot, SlotRegistry


class SlotAhead:
    """One slot, reserved in the background. Belongs to one asyncio loop; made by `slot_ahead`."""

    def __init__(self, slots: SlotRegistry) -> None:
        self._slots = slots
        self._reserving = asyncio.ensure_future(in_thread(slots.reserve))
        self._given = False

    async def allocate(self, home: Path, instance_id: str) -> Slot:
        """Give the slot to an instance. Raises HostUnfit."""
        reserved = await asyncio.shield(self._reserving)
        return await in_thread(self._allocate, home, instance_id, reserved)

    async def give_back(self) -> None:
        """Remove the slot if no instance got it."""
        with contextlib.suppress(TorporError):  # there is none then
            reserved = await self._reserving
            if not self._given:
                await in_thread(self._slots.cancel, reserved)

    def _allocate(self, home: Path, instance_id: str, reserved: Slot) -> Slot:
        slot = self._slots.allocate(home, instance_id, reserved=reserved)
        self._given = True
        return slot


@contextlib.asynccontextmanager
async def slot_ahead(slots: SlotRegistry) -> AsyncIterator[SlotAhead]:
    """Reserve a slot for the body, which may take it; nothing is left of it otherwise."""
    ahead = SlotAhead(slots)
    try:
        yield ahead
    finally:
        await finish(ahead.give_back())
