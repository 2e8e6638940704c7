"""Firecracker as a Vmm.

Firecracker writes device state with memory only. Of a restored VM it is asked to write memory where
it cannot, which it finds out when device state is written: pagemap finds what was written, counts
from the mapping of memory and not from the last snapshot, and a failed snapshot loses nothing of
it. A version that refuses in another way gets a Diff snapshot, whose memory is thrown away. Of a
booted VM that memory is kept, and later ones are merged into it (see `memory`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import re
import shutil
from typing import TYPE_CHECKING, ClassVar, Final

from torpor.errors import HostUnfit, NoSpace, VmmFailed
from torpor.host import cpu, pagemap, process
from torpor.host.cancel import in_thread
from torpor.host.seccomp import refuse_huge_pages
from torpor.snapshot.manifest import Platform
from torpor.vmm.firecracker import requests
from torpor.vmm.firecracker.api import Api, ConnectionLost, RequestRefused
from torpor.vmm.firecracker.jail import Jail, copy_out
from torpor.vmm.firecracker.jailer import LockedJail, find_jailer
from torpor.vmm.firecracker.memory import copy_diff, maps_file
from torpor.vmm.firecracker.program import find_version, require_kvm
from torpor.vmm.interface import Driver, VmConfig, Vmm, VmmState, WrittenMemory
from torpor.vmm.written import WrittenCopy, copy_written_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from torpor.config import Settings
    from torpor.host.process import ProcessId
    from torpor.units import Digest
    from torpor.vmm.firecracker.program import Version
    from torpor.vmm.firecracker.requests import Request

MACHINE_TYPE: Final = "mmio"
_ELF: Final = b"\x7fELF"
_LISTEN_TIMEOUT_S: Final = 20.0
_LISTEN_RETRY_S: Final = 0.002
_END_TIMEOUT_S: Final = 5.0
_ADOPTABLE: Final = {"Running": VmmState.RUNNING, "Paused": VmmState.PAUSED}
_LOG_PREFIX = re.compile(r"^\S+ \[[^\]]*\] ")
_LAST_LINES: Final = 6


class FirecrackerDriver(Driver):
    """Firecracker 1.12 and later, under KVM."""

    name: ClassVar[str] = "firecracker"

    def __init__(self, settings: Settings) -> None:
        self._program = settings.firecracker
        self._jailer = settings.jailer
        self._accelerator = settings.accelerator

    def platform(self, kernel: Digest) -> Platform:
        """See Driver."""
        require_kvm(self._accelerator)
        return Platform(
            architecture=os.uname().machine,
            vmm=self.name,
            vmm_version=str(find_version(self._program)),
            machine_type=MACHINE_TYPE,
            accelerator="kvm",
            cpu_model="host",
            cpu_vendor=cpu.vendor(),
            cpu_flags=tuple(sorted(cpu.flags())),
            page_bytes=pagemap.PAGE_BYTES,
            kernel=kernel,
            cpuid=cpu.guest_features(),
        )

    def create(self, config: VmConfig) -> FirecrackerVmm:
        """See Driver."""
        return FirecrackerVmm(config, program=self._program, jailer=self._jailer)

    async def adopt(self, config: VmConfig, process: ProcessId) -> FirecrackerVmm:
        """See Driver."""
        vmm = self.create(config)
        await vmm.attach(process)
        return vmm


class FirecrackerVmm(Vmm):
    """One Firecracker process."""

    def __init__(self, config: VmConfig, *, program: str, jailer: str) -> None:
        super().__init__(config)
        self._program = program
        self._jailer = jailer
        self._process: ProcessId | None = None
        self._version: Version | None = None
        self._jail = LockedJail.found(config) or Jail.of(config)
        self._api = Api(self._jail.socket)
        self._restored = False  # memory is a mapping of the memory file
        self._saved = False
        self._copy: WrittenCopy | None = None

    @property
    def process(self) -> ProcessId | None:
        """See Vmm."""
        return self._process

    def last_words(self) -> str:
        """See Vmm."""
        try:
            said = self.config.vmm_log.read_text(errors="replace").strip().splitlines()
        except FileNotFoundError:
            return ""
        lines = [line for line in said if requests.NOT_OPENED not in line]
        return "\n".join(_LOG_PREFIX.sub("", line) for line in lines[-_LAST_LINES:])

    async def attach(self, identity: ProcessId) -> None:
        """Take over a Firecracker that another process of torpor started. Raises VmmFailed."""
        self._process = identity
        answer = await self._api.ask(requests.Request("GET", "/"))
        found = answer.get("state") if isinstance(answer, dict) else answer
        state = _ADOPTABLE.get(str(found))
        if state is None:
            raise VmmFailed(f"Firecracker process {identity.pid} does not run", reason=str(found))
        self._restored = await in_thread(maps_file, identity.pid, self.config.memory)
        self._enter(state)

    async def _boot(self) -> None:
        asked = requests.boot_requests(self.config)
        await in_thread(_check_kernel, self.config.vmlinux)
        await self._start()
        for request in asked:
            await self._ask(request)

    async def _start(self) -> None:
        await in_thread(self._spawn)
        await self._listening()

    def _spawn(self) -> None:
        """Start Firecracker; its identity is kept here, where no cancellation loses it."""
        config = self.config
        if not config.memory.is_file():
            raise VmmFailed(f"there is no memory file {config.memory}")
        self._version = find_version(self._program)
        program = str(shutil.which(self._program))
        jailer = find_jailer(self._jailer)
        if jailer is not None:
            self._jail = LockedJail.made_for(config, jailer, program)
            self._api = Api(self._jail.socket)
        config.vmm_log.touch()
        with self._jail.made(config) as inherited:
            self._process = process.spawn(
                self._jail.command(config, program),
                log=config.console_log,  # the guest's console is Firecracker's standard output
                cwd=self._jail.directory,
                pass_fds=inherited,
                prepare=self._preparation(),
            )

    def _preparation(self) -> Callable[[], None] | None:
        first = self._jail.prepare(self.config)
        if not self.config.paged:
            return first

        def both() -> None:
            if first is not None:
                first()
            refuse_huge_pages()

        return both

    async def _listening(self) -> None:
        """Firecracker makes its socket itself and tells nobody when."""
        assert self._process is not None
        try:
            async with asyncio.timeout(_LISTEN_TIMEOUT_S):
                while not self._api.listens():
                    if not self._process.is_alive():
                        raise VmmFailed("Firecracker ended at its start", reason=self._said())
                    await asyncio.sleep(_LISTEN_RETRY_S)
        except TimeoutError:
            raise VmmFailed(
                f"Firecracker made no socket within {_LISTEN_TIMEOUT_S:.0f} s", reason=self._said()
            ) from None

    def _said(self) -> str:
        words = self.last_words()
        with contextlib.suppress(FileNotFoundError):
            lines = self.config.console_log.read_text(errors="replace").splitlines()
            words = words or "\n".join(lines[-_LAST_LINES:])
        return words

    async def _load(self, vmstate: Path) -> None:
        if self._version is None:
            raise VmmFailed("the version of this Firecracker is not known")
        await in_thread(self._jail.put_state, vmstate)
        await self._ask(requests.load_request(self._version))
        self._restored = True

    async def _resume(self) -> None:
        self._saved = False
        await self._ask(requests.run_request(paused=False))

    async def _pause(self) -> None:
        await self._ask(requests.run_request(paused=True))

    async def _save_state(self, vmstate: Path) -> None:
        if not (self._restored and await self._save_state_alone()):
            await self._save()
        if self._copy is None:
            await in_thread(self._bring_out, vmstate)

    async def _copy_written_memory(self, data: Path) -> WrittenMemory:
        assert self._process is not None
        pid = self._process.pid
        if self._copy is not None:
            return await in_thread(self._copy.finish)
        if self._restored:
            return await in_thread(copy_written_memory, pid, self.config.memory, data)
        if not self._saved:
            await self._save()
        return await in_thread(
            copy_diff, functools.partial(self._jail.open_saved, pid, requests.SAVED_MEMORY), data
        )

    @contextlib.contextmanager
    def _readiness(self, vmstate: Path, data: Path) -> Iterator[None]:
        if not self._restored:
            yield
            return
        assert self._process is not None
        pid = self._process.pid
        with WrittenCopy.begun(pid, self.config.memory, data) as self._copy, self._api.kept_open():
            try:
                self._copy.make_room()
                self._write_out()
                yield
            finally:
                self._copy = None
        self._bring_out(vmstate)

    def _write_out(self) -> None:
        """Firecracker synchronizes its disks before it saves their state: have little left."""
        with self.config.scratch.open("rb") as scratch:
            os.fsync(scratch.fileno())

    async def _save_state_alone(self) -> bool:
        """Whether Firecracker wrote device state before it refused to write memory."""
        try:
            await self._ask(requests.save_state_request())
        except RequestRefused as error:
            return requests.NOT_OPENED in error.reason
        return True

    async def _save(self) -> None:
        """Let Firecracker write device state and memory, as they are in this pause."""
        assert self._process is not None
        lost = self._jail.lost_memory
        try:
            await self._ask(requests.save_request(whole=lost.exists() and not self._restored))
        except BaseException:
            lost.touch()  # Firecracker may count pages as saved that are in no file now
            self._drop(requests.SAVED_STATE)
            self._drop(requests.SAVED_MEMORY)
            raise
        lost.unlink(missing_ok=True)
        self._saved = True

    def _bring_out(self, vmstate: Path) -> None:
        """Device state to its place; of a restored VM, memory is dropped. Blocking."""
        assert self._process is not None
        try:
            copy_out(self._jail.open_saved(self._process.pid, requests.SAVED_STATE), vmstate)
        except OSError as error:
            kind = NoSpace if error.errno == errno.ENOSPC else VmmFailed
            raise kind(f"device state cannot be written to {vmstate}", reason=str(error)) from None
        finally:
            self._drop(requests.SAVED_STATE)
            if self._restored:
                self._drop(requests.SAVED_MEMORY)

    def _drop(self, name: str) -> None:
        assert self._process is not None
        self._jail.drop_saved(self._process.pid, name)

    async def _stop(self) -> None:
        if self._process is not None:
            await in_thread(self._process.kill)

    async def _detach(self) -> None:
        return

    async def _ask(self, request: Request) -> Any:  # noqa: ANN401
        try:
            return await self._api.ask(request)
        except ConnectionLost as error:
            if not await in_thread(self._ends):
                raise
            words = self.last_words()
            if words in error.reason or error.reason in words:
                raise
            raise VmmFailed(error.message, reason=f"{error.reason}\n{words}") from None

    def _ends(self) -> bool:
        """Whether the process ends; one that does closes its connections first."""
        assert self._process is not None
        return self._process.wait(timeout_s=_END_TIMEOUT_S)


def _check_kernel(path: Path) -> None:
    """Firecracker loads an ELF kernel only."""
    hint = "run `torpor kernel install`"
    try:
        with path.open("rb") as stream:
            magic = stream.read(len(_ELF))
    except FileNotFoundError:
        raise HostUnfit(f"there is no kernel {path} for Firecracker", hint=hint) from None
    if magic != _ELF:
        raise HostUnfit(f"the kernel {path} is no ELF file", reason=repr(magic), hint=hint)
