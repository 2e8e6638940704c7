"""A live instance, and how the node talks to the agent in it."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torpor.errors import GuestFailed, NoSpace, TorporError, VmmFailed
from torpor.host.cancel import checkpoint, in_thread
from torpor.image.agent import AGENT_PORT, AgentClient
from torpor.node.console import read_tail
from torpor.node.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torpor.net.registry import Slot
    from torpor.node.trace import Trace
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.manifest import Function, Machine
    from torpor.units import Digest
    from torpor.vmm.interface import Vmm

T = TypeVar("T")

_CONNECT_ATTEMPT_S = 0.1


@dataclass
class Instance:
    """A live instance and the means to talk to it. Belongs to one asyncio loop."""

    id: str
    directory: Path
    vmm: Vmm
    slot: Slot
    function: Function | None
    machine: Machine
    image: Digest
    parent: LocalSnapshot | None
    timeline: Timeline = field(default_factory=Timeline)
    trace: Trace | None = None

    @property
    def address(self) -> str:
        """The clone IP: where this host reaches the function."""
        return str(self.slot.addresses.clone_ip)

    async def with_agent(self, use: Callable[[AgentClient], T], *, timeout_s: float) -> T:
        """Run one exchange with the agent in a thread. Raises GuestFailed, VmmFailed."""
        try:
            return await in_thread(self._talk, use, timeout_s)
        except GuestFailed as error:
            process = self.vmm.process
            if process is not None and not process.is_alive():
                raise self._ended() from None
            raise GuestFailed(
                error.message, reason=error.reason, hint=error.hint or self.last_words()
            ) from None

    def _ended(self) -> TorporError:
        """Why the VMM is gone, as far as can be told."""
        message = f"the VMM of instance {self.id} ended"
        with contextlib.suppress(FileNotFoundError):  # another command removes the instance
            if os.statvfs(self.directory).f_bavail == 0:  # it ends by SIGBUS, without a word
                return NoSpace(message, reason=f"the disk of {self.directory} is full")
        return VmmFailed(message, reason=self.last_words())

    def last_words(self, lines: int = 15) -> str:
        """The end of the console and of the VMM's own output, for error messages."""
        return read_tail(self.vmm.config.console_log, lines) or self.vmm.last_words()

    def _talk(self, use: Callable[[AgentClient], T], timeout_s: float) -> T:
        deadline = time.monotonic() + timeout_s
        while True:
            checkpoint()
            process = self.vmm.process
            if process is not None and not process.is_alive():
                raise GuestFailed("the guest is gone")
            try:
                connection = self.slot.connect(AGENT_PORT, timeout_s=_CONNECT_ATTEMPT_S)
                break
            except (OSError, TorporError) as error:
                if time.monotonic() > deadline:
                    raise GuestFailed(
                        f"the agent did not answer within {timeout_s:.0f} s", reason=str(error)
                    ) from None
        with connection:
            return use(AgentClient(connection, timeout_s=max(deadline - time.monotonic(), 0.1)))
