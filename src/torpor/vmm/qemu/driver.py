"""QEMU as a Vmm: start, load, pause, save, written memory by pagemap, stop."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import os
import re
import socket
from typing import TYPE_CHECKING, ClassVar, Final

from torpor.errors import HostUnfit, NoSpace, VmmFailed
from torpor.host import cpu, pagemap, process
from torpor.host.cancel import in_thread
from torpor.host.seccomp import refuse_huge_pages
from torpor.host.tsc import measure_tsc_khz
from torpor.snapshot.manifest import Platform
from torpor.vmm.interface import Driver, VmConfig, Vmm, VmmState, WrittenMemory
from torpor.vmm.qemu import arguments
from torpor.vmm.qemu.kernel_head import write_kernel_head
from torpor.vmm.qemu.models import check_model
from torpor.vmm.qemu.monitor import Monitor
from torpor.vmm.written import WrittenCopy, copy_written_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.config import Settings
    from torpor.host.process import ProcessId
    from torpor.units import Digest
    from torpor.vmm.interface import StepTimer

_CPU_MODELS: Final = {"tcg": "max", "kvm": "host"}
_VERSION = re.compile(r"version (\d+\.\d+(?:\.\d+)?)")
_SOCKET_NAME: Final = "qmp.sock"
_STATE_NAME: Final = "s"
_KERNEL_HEAD: Final = "kernel-head"
_STALLED: Final = "io-error"
"""QEMU's state after a write that found the disk full (werror=enospc, its default)."""
_ADOPTABLE: Final = {"running": VmmState.RUNNING, "paused": VmmState.PAUSED}


class QemuDriver(Driver):
    """QEMU with the microvm machine under KVM or TCG."""

    name: ClassVar[str] = "qemu"

    def __init__(self, settings: Settings) -> None:
        self._program = settings.qemu
        self.accelerator = cpu.choose_accelerator(settings.accelerator)
        self.cpu_model = settings.cpu_model or _CPU_MODELS[self.accelerator]
        self.machine_type = arguments.NEW_MACHINE_TYPE

    def like(self, platform: Platform) -> QemuDriver:
        """See Driver."""
        if platform.machine_type not in arguments.MACHINE_TYPES:
            return self
        other = copy.copy(self)
        other.machine_type = platform.machine_type
        return other

    def platform(self, kernel: Digest) -> Platform:
        """See Driver.

        Under TCG the guest's CPU is QEMU's own, whatever the host has. A named model shows guests
        the same on all hosts that can: what it needs is in its name. Raises InvalidInput or
        HostUnfit for a model that this host has not.
        """
        native = self.accelerator == "kvm"
        shown = native and self.cpu_model == "host"
        if self.cpu_model not in _CPU_MODELS.values():
            check_model(self._program, self.accelerator, self.cpu_model)
        return Platform(
            architecture=os.uname().machine,
            vmm=self.name,
            vmm_version=_version(self._program),
            machine_type=self.machine_type,
            accelerator=self.accelerator,
            cpu_model=self.cpu_model,
            cpu_vendor=cpu.vendor() if native else "",
            cpu_flags=tuple(sorted(cpu.flags())) if shown else (),
            page_bytes=pagemap.PAGE_BYTES,
            kernel=kernel,
            cpuid=cpu.guest_features() if shown else (),
        )

    def create(self, config: VmConfig) -> QemuVmm:
        """See Driver."""
        return QemuVmm(
            config,
            program=self._program,
            machine_type=self.machine_type,
            accelerator=self.accelerator,
            cpu_model=self.cpu_model,
        )

    async def adopt(self, config: VmConfig, process: ProcessId) -> QemuVmm:
        """See Driver."""
        vmm = self.create(config)
        await vmm.attach(process)
        return vmm

    async def stands_still(self, config: VmConfig, process: ProcessId) -> bool:
        """See Driver."""
        return await self.create(config).stands_still()

    async def revive(self, config: VmConfig, process: ProcessId) -> bool:
        """See Driver."""
        return await self.create(config).revive()


class QemuVmm(Vmm):
    """One QEMU process."""

    def __init__(
        self,
        config: VmConfig,
        *,
        program: str,
        machine_type: str,
        accelerator: str,
        cpu_model: str,
    ) -> None:
        super().__init__(config)
        self._program = program
        self._machine_type = machine_type
        self._accelerator = accelerator
        self._cpu_model = cpu_model
        self._process: ProcessId | None = None
        self._monitor: Monitor | None = None
        self._copy: WrittenCopy | None = None

    @property
    def process(self) -> ProcessId | None:
        """See Vmm."""
        return self._process

    def last_words(self) -> str:
        """See Vmm."""
        try:
            lines = self.config.vmm_log.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(line for line in lines[-6:] if "vmdescription" not in line)

    async def attach(self, identity: ProcessId) -> None:
        """Take over a QEMU that another process of torpor started. Raises VmmFailed."""
        self._process = identity
        try:
            answer = await (await self._connect()).execute("query-status")
            state = _ADOPTABLE.get(answer["status"])
            if answer["status"] == _STALLED:
                raise NoSpace(
                    "the VM stands still, because the disk was full when it wrote to its own",
                    hint="free some space: the daemon, or the next command, then lets it go on",
                )
            if state is None:
                raise VmmFailed(
                    f"QEMU process {identity.pid} does not run", reason=answer["status"]
                )
        except BaseException:
            await self._disconnect()
            raise
        self._enter(state)

    async def stands_still(self) -> bool:
        """Whether a write of the guest found the disk full. Raises VmmFailed."""
        try:
            answer = await (await self._connect()).execute("query-status")
        finally:
            await self._disconnect()
        return bool(answer["status"] == _STALLED)

    async def revive(self) -> bool:
        """Let QEMU go on if a write of the guest found the disk full. Raises VmmFailed."""
        try:
            monitor = await self._connect()
            if (await monitor.execute("query-status"))["status"] != _STALLED:
                return False
            await monitor.execute("cont")
        finally:
            await self._disconnect()
        return True

    async def _boot(self) -> None:
        kernel = arguments.kernel_arguments(self.config)
        await self._launch([*kernel, *await in_thread(self._clock_arguments)])

    def _clock_arguments(self) -> list[str]:
        """Under TCG, the rate of the counter that the guest sees, in place of -append's words.

        The kernel would calibrate it against the PIT; on a busy host it fails at that now and
        then, and without it has no timer at all: it hangs before it prints anything.
        """
        rate_khz = measure_tsc_khz() if self._accelerator == "tcg" else None
        if rate_khz is None:
            return []
        return ["-append", f"{self.config.command_line} tsc_early_khz={rate_khz}"]

    async def _start(self) -> None:
        head = self.config.directory / _KERNEL_HEAD
        await in_thread(write_kernel_head, self.config.kernel, head)
        kernel = arguments.restored_kernel_arguments(head)
        await self._launch([*kernel, "-S", "-incoming", "defer"])

    async def _load(self, vmstate: Path) -> None:
        monitor = await self._connected()
        events = {"capability": "events", "state": True}
        with _opened(vmstate) as descriptor:
            await self._command("migrate-set-capabilities", capabilities=[events])
            await monitor.send_descriptor(descriptor, "vmstate")
        with self._explained():
            status = await monitor.execute_until(
                "migrate-incoming",
                {"uri": "fd:vmstate"},
                event="MIGRATION",
                statuses=("completed", "failed"),
            )
        if status != "completed":
            raise VmmFailed("QEMU refused the device state", reason=self.last_words())

    async def _resume(self) -> None:
        await self._command("cont")

    async def _pause(self) -> None:
        await self._command("stop")

    async def _save_state(self, vmstate: Path) -> None:
        # live, it would hand the disks over to another QEMU: they are taken back at `cont`, and
        # a second such command in one pause ends QEMU
        name = str(vmstate) if self._copy is None else _STATE_NAME
        await self._command("xen-save-devices-state", filename=name, live=False)

    async def _copy_written_memory(self, data: Path) -> WrittenMemory:
        assert self._process is not None
        if self._copy is not None:
            return await in_thread(self._copy.finish)
        return await in_thread(copy_written_memory, self._process.pid, self.config.memory, data)

    async def _freeze(self, vmstate: Path, data: Path, step: StepTimer) -> WrittenMemory:
        """See Vmm. Memory is copied while QEMU saves device state."""
        with step("pause"):
            await self.pause()
        return await self._step(
            functools.partial(self._save_and_copy, vmstate, data, step),
            {VmmState.PAUSED},
            VmmState.PAUSED,
        )

    async def _save_and_copy(self, vmstate: Path, data: Path, step: StepTimer) -> WrittenMemory:
        async def save() -> None:
            with step("device state"):
                await self._save_state(vmstate)

        saving = asyncio.ensure_future(save())
        try:
            with step("written memory"):
                written = await self._copy_written_memory(data)
            await saving
        finally:
            await asyncio.gather(saving, return_exceptions=True)
        return written

    @contextlib.contextmanager
    def _readiness(self, vmstate: Path, data: Path) -> Iterator[None]:
        assert self._process is not None
        # QEMU reads commands byte by byte: a short name in its working directory, renamed later
        saved = self.config.directory / _STATE_NAME
        try:
            with WrittenCopy.begun(self._process.pid, self.config.memory, data) as self._copy:
                self._copy.make_room()
                yield
            try:
                saved.rename(vmstate)
            except OSError as error:
                raise VmmFailed("device state cannot be kept", reason=str(error)) from None
        finally:
            self._copy = None
            saved.unlink(missing_ok=True)

    async def _stop(self) -> None:
        await self._disconnect()
        if self._process is not None:
            await in_thread(self._process.kill)

    async def _detach(self) -> None:
        await self._disconnect()

    async def _launch(self, extra: list[str]) -> None:
        await in_thread(self._spawn, extra)
        await self._connected()

    def _spawn(self, extra: list[str]) -> None:
        """Start QEMU; its identity is kept here, where no cancellation loses it."""
        config = self.config
        if not config.memory.is_file():  # QEMU would make an empty one
            raise VmmFailed(f"there is no memory file {config.memory}")
        with _listening(config.directory / _SOCKET_NAME) as listener:
            command = [
                self._program,
                *arguments.machine_arguments(
                    config,
                    machine_type=self._machine_type,
                    accelerator=self._accelerator,
                    cpu_model=self._cpu_model,
                ),
                *arguments.device_arguments(config),
                *arguments.monitor_arguments(listener.fileno()),
                *extra,
            ]
            if config.namespace is not None:
                command = ["nsenter", f"--net=/run/netns/{config.namespace}", "--", *command]
            self._process = process.spawn(
                command,
                log=config.vmm_log,
                cwd=config.directory,
                pass_fds=[listener.fileno()],
                prepare=refuse_huge_pages if config.paged else None,
            )

    async def _connected(self) -> Monitor:
        if self._monitor is None:
            with self._explained():
                await self._connect()
        assert self._monitor is not None
        return self._monitor

    async def _connect(self) -> Monitor:
        monitor = Monitor(self.config.directory.name)
        await monitor.connect(self.config.directory / _SOCKET_NAME)
        self._monitor = monitor
        return monitor

    async def _disconnect(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()

    async def _command(self, command: str, **arguments: object) -> None:
        monitor = await self._connected()
        with self._explained():
            await monitor.execute(command, **arguments)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Add what QEMU printed to an error that it caused."""
        try:
            yield
        except VmmFailed as error:
            words = self.last_words()
            if not words:
                raise
            raise VmmFailed(error.message, reason=words, hint=error.hint) from None


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket; its directory is entered because a socket's path is short."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            listener.bind(f"/proc/self/fd/{parent}/{path.name}")
        finally:
            os.close(parent)
        listener.listen(4)
        yield listener


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=4)
def _version(program: str) -> str:
    words = process.run([program, "--version"], timeout_s=20, hint="run `make setup`")
    found = _VERSION.search(words)
    if found is None:
        raise HostUnfit(f"{program} does not tell its version", reason=words.splitlines()[0])
    return found[1]
