"""The Vmm interface: one VM process and what may be done with it in which state.

                    boot
          ┌───────────────────────► RUNNING ◄──┐
    NEW ──┤  start        load         ▲       │ resume
          └──────► STARTED ───► PAUSED ┴───────┤
                                   ▲   pause   │
                                   └───────────┘
    any state ── stop, or any failure ──► DEAD

A public method names the states it needs; called in another one it raises InternalError and
changes nothing. A failure inside a method ends the VM process before the error leaves: after it
the state is DEAD and nothing of the VM runs. The two that only read a paused VM (`save_state`,
`copy_written_memory`) leave it PAUSED as long as its process lives, so that a full disk does not
cost anybody an instance. A cancellation of a method is such a failure, but for `pause`, `resume`
and `freeze`: these are short, come to their end first, and let the cancellation through in the
state that they lead to. All methods belong to one asyncio loop and are not to be called side by
side on one object.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torpor.errors import InternalError
from torpor.host.cancel import entered_in_thread
from torpor.host.sparse import unite

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
    from pathlib import Path

    from torpor.host.process import ProcessId
    from torpor.snapshot.manifest import Machine, Platform
    from torpor.units import Digest

    StepTimer = Callable[[str], contextlib.AbstractContextManager[None]]
    """What times the body under a name."""

R = TypeVar("R")


class VmmState(enum.Enum):
    """Where a VM is in its life."""

    NEW = "new"
    STARTED = "started"
    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


@dataclass(frozen=True)
class VmConfig:
    """Everything that one VM process is made of.

    `directory` is the instance's own, where sockets and logs go. `kernel` and `vmlinux` are one
    kernel in two forms, as packaged and as an ELF file: a driver takes what its VMM loads. `memory`
    is the file that becomes the guest's memory by private mapping: it is never written. A VM that
    boots has an empty one, all holes, in whose place a VMM may have anonymous memory. `namespace`
    is the network namespace in which `tap` exists; with None the guest reaches nothing. With
    `paged`, memory comes from a pager: a missing page must not bring a huge one along.
    """

    directory: Path
    machine: Machine
    kernel: Path
    vmlinux: Path
    initramfs: Path
    command_line: str
    memory: Path
    image: Path
    scratch: Path
    app: Path
    namespace: str | None = None
    tap: str = "tap0"
    guest_mac: str = "06:00:ac:10:00:02"
    paged: bool = False

    @property
    def console_log(self) -> Path:
        """Everything the guest's console printed."""
        return self.directory / "console.log"

    @property
    def vmm_log(self) -> Path:
        """What the VMM process itself printed."""
        return self.directory / "vmm.log"


@dataclass(frozen=True)
class WrittenMemory:
    """Guest memory written since the VM's memory file was mapped.

    `pieces` are (offset, length) in bytes, multiples of the page size; `data` holds their bytes one
    after the other. They may overlap, and later ones are newer.
    """

    pieces: list[tuple[int, int]] = field(repr=False)
    data: Path

    @functools.cached_property
    def runs(self) -> list[tuple[int, int]]:
        """What the pieces cover, ascending, not touching. Not for the pause: there are many."""
        return unite(self.pieces)

    @property
    def size_bytes(self) -> int:
        """Bytes in all runs."""
        return sum(length for _, length in self.runs)


class Vmm(abc.ABC):
    """One VM. Drivers implement the underscored methods; the guard round them is here."""

    def __init__(self, config: VmConfig) -> None:
        self.config = config
        self.state = VmmState.NEW
        self.observers: list[Callable[[VmmState], None]] = []

    @property
    @abc.abstractmethod
    def process(self) -> ProcessId | None:
        """The VM's process, None before it started."""

    @abc.abstractmethod
    def last_words(self) -> str:
        """The end of what the VMM itself printed, without what is harmless, for error messages."""

    async def boot(self) -> None:
        """NEW -> RUNNING: start the process and the kernel. Raises VmmFailed, HostUnfit."""
        await self._step(self._boot, {VmmState.NEW}, VmmState.RUNNING)

    async def start(self) -> None:
        """NEW -> STARTED: start the process so that device state can be loaded into it."""
        await self._step(self._start, {VmmState.NEW}, VmmState.STARTED)

    async def load(self, vmstate: Path) -> None:
        """STARTED -> PAUSED: load device state made by `save_state` over the same memory.

        Raises VmmFailed with the VMM's own words when it refuses.
        """
        await self._step(
            functools.partial(self._load, vmstate), {VmmState.STARTED}, VmmState.PAUSED
        )

    async def resume(self) -> None:
        """PAUSED -> RUNNING."""
        await finish(self._step(self._resume, {VmmState.PAUSED}, VmmState.RUNNING))

    async def pause(self) -> None:
        """RUNNING -> PAUSED: all vCPUs stand still and all disk writes have reached the files."""
        await finish(self._step(self._pause, {VmmState.RUNNING}, VmmState.PAUSED))

    async def save_state(self, vmstate: Path) -> None:
        """PAUSED: write the device state (no memory, no disk) to a new file."""
        await self._step(
            functools.partial(self._save_state, vmstate), {VmmState.PAUSED}, VmmState.PAUSED
        )

    async def copy_written_memory(self, data: Path) -> WrittenMemory:
        """PAUSED: copy every page written since memory was mapped to a new file.

        Taken again it has the same pages: what was saved or copied in between does not count.
        """
        return await self._step(
            functools.partial(self._copy_written_memory, data), {VmmState.PAUSED}, VmmState.PAUSED
        )

    @contextlib.asynccontextmanager
    async def ready_to_freeze(self, vmstate: Path, data: Path) -> AsyncIterator[None]:
        """RUNNING: have ready what one `freeze` of the same arguments in the body needs.

        What it writes is complete at the end of the body. Raises VmmFailed and NoSpace at both
        ends, where the VM's state stays as it is.
        """
        if self.state is not VmmState.RUNNING:
            raise InternalError(f"the VM is {self.state.value}, it has to be running")
        async with entered_in_thread(self._readiness(vmstate, data)):
            yield

    async def freeze(self, vmstate: Path, data: Path, *, step: StepTimer) -> WrittenMemory:
        """RUNNING -> PAUSED: `pause`, `save_state` and `copy_written_memory` as fast as can be.

        Comes to its end before a cancellation goes on. When saving or copying fails the VM is
        PAUSED as long as its process lives. `step` times each of the three, which may overlap.
        """
        return await finish(self._freeze(vmstate, data, step))

    async def stop(self) -> None:
        """Any state -> DEAD: end the process and wait for its end. Safe to repeat."""
        if self.state is not VmmState.DEAD:
            self._enter(VmmState.DEAD)
            await self._stop()

    async def detach(self) -> None:
        """Let go of a VM that is to outlive this process; RUNNING or PAUSED, it stays so."""
        await self._detach()

    async def _step(
        self, work: Callable[[], Awaitable[R]], needs: set[VmmState], then: VmmState
    ) -> R:
        if self.state not in needs:
            names = " or ".join(sorted(state.value for state in needs))
            raise InternalError(f"the VM is {self.state.value}, it has to be {names}")
        try:
            result = await work()
        except BaseException:
            alive = self.process is not None and self.process.is_alive()
            if not (alive and self.state is then is VmmState.PAUSED):
                await finish(self.stop())
            raise
        self._enter(then)
        return result

    def _enter(self, state: VmmState) -> None:
        if state is not self.state:
            self.state = state
            for observer in self.observers:
                observer(state)

    def _readiness(self, vmstate: Path, data: Path) -> contextlib.AbstractContextManager[object]:
        """What `ready_to_freeze` enters and leaves; it may block."""
        return contextlib.nullcontext()

    async def _freeze(self, vmstate: Path, data: Path, step: StepTimer) -> WrittenMemory:
        with step("pause"):
            await self.pause()
        with step("device state"):
            await self.save_state(vmstate)
        with step("written memory"):
            return await self.copy_written_memory(data)

    @abc.abstractmethod
    async def _boot(self) -> None: ...

    @abc.abstractmethod
    async def _start(self) -> None: ...

    @abc.abstractmethod
    async def _load(self, vmstate: Path) -> None: ...

    @abc.abstractmethod
    async def _resume(self) -> None: ...

    @abc.abstractmethod
    async def _pause(self) -> None: ...

    @abc.abstractmethod
    async def _save_state(self, vmstate: Path) -> None: ...

    @abc.abstractmethod
    async def _copy_written_memory(self, data: Path) -> WrittenMemory: ...

    @abc.abstractmethod
    async def _stop(self) -> None: ...

    @abc.abstractmethod
    async def _detach(self) -> None: ...


class Driver(abc.ABC):
    """Makes VMs of one kind; `name` is what manifests call it."""

    name: ClassVar[str]

    @abc.abstractmethod
    def platform(self, kernel: Digest) -> Platform:
        """What snapshots made here depend on. Blocking; HostUnfit when the VMM is missing."""

    def like(self, platform: Platform) -> Driver:
        """The driver for what was made on a platform, if this VMM has it in several kinds."""
        return self

    @abc.abstractmethod
    def create(self, config: VmConfig) -> Vmm:
        """A VM in state NEW; nothing is started yet."""

    @abc.abstractmethod
    async def adopt(self, config: VmConfig, process: ProcessId) -> Vmm:
        """The VM that another process of torpor started and that is RUNNING or PAUSED.

        Raises VmmFailed when it does not answer or is in neither state, NoSpace when it stands
        still because a disk was full.
        """

    async def stands_still(self, config: VmConfig, process: ProcessId) -> bool:
        """Whether a VM stands still because a disk was full. Raises VmmFailed when it is silent."""
        return False

    async def revive(self, config: VmConfig, process: ProcessId) -> bool:
        """Let a VM go on that stands still because a disk was full; whether it did stand still.

        What it could not write is written now. Without this method a VMM never stands still so.
        Raises VmmFailed when it does not answer.
        """
        return False


async def finish(work: Coroutine[Any, Any, R]) -> R:
    """Run `work` to its end however often we are cancelled, then let the cancellation through."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            break
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
