"""The contract of torpor.vmm.interface, run on every driver."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from fixtures.fake_vmm import FakeDriver
from fixtures.firecracker import make_fake, needed_firecracker, needed_jailer
from torpor.config import Settings
from torpor.errors import InternalError, TorporError, VmmFailed
from torpor.host.sparse import copy_sparse, write_page_runs
from torpor.image.kernel import KERNEL_CMDLINE, load_boot
from torpor.image.scratch import make_empty_app, make_scratch
from torpor.image.squashfs import tree_to_squashfs
from torpor.snapshot.manifest import Machine
from torpor.units import MiB
from torpor.vmm.firecracker.driver import FirecrackerDriver
from torpor.vmm.interface import Driver, VmConfig, Vmm, VmmState, WrittenMemory
from torpor.vmm.qemu.driver import QemuDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

MACHINE = Machine(memory_bytes=128 * MiB, vcpus=1, scratch_bytes=64 * MiB, app_bytes=MiB)

# it says when it begins, and does not write all of memory then
_COMMAND_LINE = KERNEL_CMDLINE.replace("quiet ", "").replace("init_on_free=1 ", "")


@dataclass
class Rig:
    """A driver and the files of VMs for it, no network."""

    driver: Driver
    directory: Path
    kernel: Path
    vmlinux: Path
    initramfs: Path
    kernel_says: str = ""
    """What the console shows when the guest runs from its own memory, no more from firmware."""

    def __post_init__(self) -> None:
        self._number = itertools.count()
        self.made: list[Vmm] = []
        make_empty_app(self.directory / "app", MACHINE.app_bytes)
        tree = self.directory / "tree"
        for name in ("proc", "sys", "dev", "tmp", "run", "app"):
            (tree / name).mkdir(parents=True)
        tree_to_squashfs(tree, self.directory / "image")  # enough for the agent: the guest stays up

    def config(self, memory: Path | None = None, scratch: Path | None = None) -> VmConfig:
        """Files for one more VM: empty memory and a fresh disk unless given."""
        directory = self.directory / f"vm{next(self._number)}"
        directory.mkdir()
        if memory is None:
            memory = directory / "memory"
            with memory.open("wb") as stream:
                stream.truncate(MACHINE.memory_bytes)
        if scratch is None:
            make_scratch(directory / "scratch", MACHINE.scratch_bytes)
        else:
            copy_sparse(scratch, directory / "scratch")
        return VmConfig(
            directory=directory,
            machine=MACHINE,
            kernel=self.kernel,
            vmlinux=self.vmlinux,
            initramfs=self.initramfs,
            command_line=_COMMAND_LINE,
            memory=memory,
            image=self.directory / "image",
            scratch=directory / "scratch",
            app=self.directory / "app",
        )

    def create(self, config: VmConfig | None = None) -> Vmm:
        """A VM in state NEW, ended at the end of the test."""
        vmm = self.driver.create(config or self.config())
        self.made.append(vmm)
        return vmm

    async def booted(self) -> Vmm:
        """A VM that has written some memory since it booted."""
        vmm = self.create()
        await vmm.boot()
        async with asyncio.timeout(60):
            for _ in itertools.count():
                if not self.kernel_says or self.kernel_says in vmm.config.console_log.read_text():
                    break
                await asyncio.sleep(0.02)
        await self.until_it_wrote(vmm, pages=8)
        return vmm

    async def until_it_wrote(self, vmm: Vmm, *, pages: int) -> WrittenMemory:
        """Let the guest run until it has written so many pages; the VM runs on."""
        async with asyncio.timeout(60):
            for attempt in itertools.count():
                await vmm.pause()
                data = self.directory / f"written-{len(self.made)}-{attempt}"
                written = await vmm.copy_written_memory(data)
                data.unlink()
                await vmm.resume()
                if written.size_bytes >= pages * 4096:
                    return written
        raise AssertionError("unreachable")

    async def frozen(self, vmm: Vmm) -> tuple[Path, Path, WrittenMemory]:
        """Pause the VM and give its device state, its whole memory, and what it wrote."""
        where = self.directory / f"snapshot-{next(self._number)}"
        where.mkdir()
        await vmm.pause()
        await vmm.save_state(where / "vmstate")
        written = await vmm.copy_written_memory(where / "written")
        return where / "vmstate", self.laid_over(vmm, written), written

    def laid_over(self, vmm: Vmm, written: WrittenMemory) -> Path:
        """The whole memory of a VM, in a new file."""
        memory = self.directory / f"memory-{next(self._number)}"
        copy_sparse(vmm.config.memory, memory)
        with memory.open("r+b") as target, written.data.open("rb") as source:
            write_page_runs(target.fileno(), written.pieces, source.fileno())
        return memory

    async def restored(self, vmm: Vmm) -> Vmm:
        """Another VM that goes on where `vmm` is now; `vmm` stays paused."""
        vmstate, memory, _ = await self.frozen(vmm)
        other = self.create(self.config(memory, vmm.config.scratch))
        await other.start()
        await other.load(vmstate)
        return other


def _fake(tmp_path: Path) -> Rig:
    nothing = tmp_path / "nothing"
    nothing.touch()
    return Rig(FakeDriver(), tmp_path, nothing, nothing, nothing)


def _qemu(tmp_path: Path) -> Rig:
    return _real(QemuDriver(Settings()), tmp_path)


def _fake_firecracker(tmp_path: Path) -> Rig:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF")
    driver = FirecrackerDriver(Settings(firecracker=make_fake(tmp_path), jailer=""))
    return Rig(driver, tmp_path, kernel, kernel, kernel)


def _firecracker(tmp_path: Path) -> Rig:
    settings = Settings(firecracker=needed_firecracker(), jailer="")
    return _real(FirecrackerDriver(settings), tmp_path)


def _jailed_firecracker(tmp_path: Path) -> Rig:
    settings = Settings(firecracker=needed_firecracker(), jailer=needed_jailer())
    return _real(FirecrackerDriver(settings), tmp_path)


def _real(driver: Driver, tmp_path: Path) -> Rig:
    boot = load_boot(Settings().boot_dir)
    says = "Linux version"
    return Rig(driver, tmp_path, boot.kernel, boot.vmlinux, boot.initramfs, says)


@pytest.fixture(
    params=[
        _fake,
        _fake_firecracker,
        pytest.param(_qemu, marks=pytest.mark.vm),
        pytest.param(_firecracker, marks=pytest.mark.vm),
        pytest.param(_jailed_firecracker, marks=pytest.mark.vm),
    ],
    ids=["fake", "fake-firecracker", "qemu", "firecracker", "jailed-firecracker"],
)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """Each driver in turn; all its VMs are dead after the test."""
    make: Callable[[Path], Rig] = request.param
    rig = make(tmp_path)
    yield rig
    for vmm in rig.made:
        await vmm.stop()
        assert vmm.process is None or not vmm.process.is_alive()


async def test_states_of_boot_pause_resume_stop(rig: Rig) -> None:
    """The observers see exactly the states of the diagram, in order."""
    vmm = rig.create()
    seen: list[VmmState] = []
    vmm.observers.append(seen.append)
    await vmm.boot()
    await vmm.pause()
    await vmm.resume()
    await vmm.stop()
    await vmm.stop()
    assert seen == [VmmState.RUNNING, VmmState.PAUSED, VmmState.RUNNING, VmmState.DEAD]


async def test_stop_ends_the_process(rig: Rig) -> None:
    """After stop the process is gone, not a zombie."""
    vmm = await rig.booted()
    process = vmm.process
    assert process is not None
    assert process.is_alive()
    await vmm.stop()
    assert not process.is_alive()


async def test_written_pages_are_the_difference_to_the_memory_file(rig: Rig) -> None:
    """Runs are page-aligned, ascending, inside memory; the memory file itself stays as it was."""
    vmm = await rig.booted()
    _, memory, written = await rig.frozen(vmm)
    assert written.size_bytes == written.data.stat().st_size > 0
    end = 0
    for offset, length in written.runs:
        assert offset >= end
        assert offset % 4096 == length % 4096 == 0
        end = offset + length
    assert end <= MACHINE.memory_bytes == memory.stat().st_size
    with vmm.config.memory.open("rb") as stream:  # it was empty
        assert not any(piece.strip(b"\0") for piece in iter(lambda: stream.read(MiB), b""))


async def test_restored_vm_goes_on(rig: Rig) -> None:
    """A VM made from device state, memory and disk runs on and writes memory of its own."""
    restored = await rig.restored(await rig.booted())
    assert restored.state is VmmState.PAUSED
    await restored.resume()
    await rig.until_it_wrote(restored, pages=1)


async def test_frozen_vm_goes_on_twice(rig: Rig) -> None:
    """What one call froze, with room made before or not, is what the separate ones give."""
    vmm = await rig.booted()
    for name in ("first", "second"):
        vmstate, data = rig.directory / f"{name}-state", rig.directory / name
        async with vmm.ready_to_freeze(vmstate, data):
            frozen = await vmm.freeze(vmstate, data, step=contextlib.nullcontext)
            assert vmm.state is VmmState.PAUSED
        again = await vmm.copy_written_memory(rig.directory / f"{name}-again")
        assert again.runs == frozen.runs
        memory = rig.laid_over(vmm, frozen)
        assert memory.read_bytes() == rig.laid_over(vmm, again).read_bytes()
        child = rig.create(rig.config(memory, vmm.config.scratch))
        await child.start()
        await child.load(vmstate)
        await vmm.stop()
        await child.resume()
        await rig.until_it_wrote(child, pages=1)
        vmm = child


async def test_freezing_fails_at_a_full_or_missing_place(rig: Rig) -> None:
    """The VM stays paused and goes on."""
    vmm = await rig.booted()
    with pytest.raises(VmmFailed):
        async with vmm.ready_to_freeze(rig.directory / "no/s", rig.directory / "w"):
            await vmm.freeze(
                rig.directory / "no/s", rig.directory / "w", step=contextlib.nullcontext
            )
    assert vmm.state is VmmState.PAUSED
    await vmm.resume()
    await rig.until_it_wrote(vmm, pages=1)


async def test_restored_vm_wrote_nothing_before_it_was_resumed(rig: Rig) -> None:
    """What a restore costs in private memory is what the guest writes, not its memory's size."""
    restored = await rig.restored(await rig.booted())
    written = await restored.copy_written_memory(rig.directory / "early")
    assert written.size_bytes <= MACHINE.memory_bytes // 64


async def test_two_clones_of_one_memory_file_do_not_see_each_other(rig: Rig) -> None:
    """Clones share the file, which stays as it was."""
    original = await rig.booted()
    vmstate, memory, _ = await rig.frozen(original)
    before = memory.read_bytes()
    clones = [rig.create(rig.config(memory, original.config.scratch)) for _ in range(2)]
    for clone in clones:
        await clone.start()
        await clone.load(vmstate)
        await clone.resume()
    for clone in clones:
        await rig.until_it_wrote(clone, pages=1)
    assert memory.read_bytes() == before


async def test_generations(rig: Rig) -> None:
    """A restore of a snapshot of a restore of a snapshot runs on."""
    vmm = await rig.booted()
    for _ in range(3):
        child = await rig.restored(vmm)
        await vmm.stop()
        await child.resume()
        await rig.until_it_wrote(child, pages=1)
        vmm = child


async def test_wrong_state_is_refused_and_changes_nothing(rig: Rig) -> None:
    """A method called in a state that it does not allow raises InternalError, the VM runs on."""
    vmm = await rig.booted()
    for method in ("start", "boot", "resume", "load", "save_state", "copy_written_memory"):
        takes_path = method in ("load", "save_state", "copy_written_memory")
        with pytest.raises(InternalError, match="the VM is running"):
            await getattr(vmm, method)(*([rig.directory / "x"] if takes_path else []))
        assert vmm.state is VmmState.RUNNING, method
    await rig.until_it_wrote(vmm, pages=1)


@pytest.mark.parametrize("content", [b"", b"garbage" * 999], ids=["empty", "garbage"])
async def test_damaged_device_state_is_refused(rig: Rig, content: bytes) -> None:
    """Loading what is not device state raises VmmFailed and leaves no process."""
    (rig.directory / "vmstate").write_bytes(content)
    vmm = rig.create()
    await vmm.start()
    with pytest.raises(VmmFailed):
        await vmm.load(rig.directory / "vmstate")
    assert vmm.state is VmmState.DEAD
    assert vmm.process is not None
    assert not vmm.process.is_alive()


async def test_killed_vmm_is_noticed(rig: Rig) -> None:
    """A VMM that dies before any step makes that step fail; the state is DEAD, nothing is left."""
    original = await rig.booted()
    vmstate, memory, _ = await rig.frozen(original)
    for step in ("load", "resume", "pause", "save_state", "copy_written_memory"):
        vmm = rig.create(rig.config(memory, original.config.scratch))
        await vmm.start()
        if step != "load":
            await vmm.load(vmstate)
        if step == "pause":
            await vmm.resume()
        assert vmm.process is not None
        vmm.process.kill()
        path = {"load": vmstate, "save_state": rig.directory / "s"}.get(step, rig.directory / "w")
        with pytest.raises(TorporError):
            await getattr(vmm, step)(*([] if step in ("pause", "resume") else [path]))
        assert vmm.state is VmmState.DEAD, step
        assert not vmm.process.is_alive()


async def test_unwritable_target_leaves_the_vm_paused(rig: Rig) -> None:
    """A snapshot that cannot be written costs nobody the instance."""
    vmm = await rig.booted()
    await vmm.pause()
    with pytest.raises(VmmFailed):
        await vmm.save_state(rig.directory / "no" / "such" / "directory")
    assert vmm.state is VmmState.PAUSED
    await vmm.resume()
    await rig.until_it_wrote(vmm, pages=1)


async def test_missing_memory_file(rig: Rig) -> None:
    """A memory file that is not there makes the start fail; nothing is left."""
    config = dataclasses.replace(rig.config(), memory=rig.directory / "absent")
    vmm = rig.create(config)
    with pytest.raises(TorporError):
        await vmm.start()
    assert vmm.state is VmmState.DEAD
    assert vmm.process is None or not vmm.process.is_alive()


async def test_cancelled_boot_leaves_nothing(rig: Rig) -> None:
    """Cancelling a method ends the VM before the cancellation goes on."""
    vmm = rig.create()
    task = asyncio.ensure_future(vmm.boot())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert vmm.state is VmmState.DEAD
    assert vmm.process is None or not vmm.process.is_alive()


@pytest.mark.parametrize(
    ("step", "then"), [("pause", VmmState.PAUSED), ("resume", VmmState.RUNNING)]
)
async def test_cancelled_pause_and_resume_come_to_their_end(
    rig: Rig, step: str, then: VmmState
) -> None:
    """A cancellation costs nobody a running VM: it goes on when the step is over."""
    vmm = await rig.booted()
    if step == "resume":
        await vmm.pause()
    task = asyncio.ensure_future(getattr(vmm, step)())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert vmm.state is then
    assert vmm.process is not None
    assert vmm.process.is_alive()
