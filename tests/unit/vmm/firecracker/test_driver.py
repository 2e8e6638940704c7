"""The driver against a program that speaks Firecracker's protocol: everything that may go wrong.

What works is held by the contract suite, which runs on the same program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.configs import vm_config
from fixtures.firecracker import make_fake
from torpor.config import Settings
from torpor.errors import HostUnfit, InvalidInput, NoSpace, TorporError, VmmFailed
from torpor.snapshot.manifest import Machine
from torpor.units import MiB
from torpor.vmm.firecracker.driver import FirecrackerDriver, FirecrackerVmm
from torpor.vmm.interface import VmmState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from torpor.vmm.interface import VmConfig

BOOT_STEPS = (
    "PUT /machine-config",
    "PUT /boot-source",
    "PUT /drives/image",
    "PUT /drives/scratch",
    "PUT /drives/app",
    "PUT /entropy",
    "PUT /actions",
)


def settings_of(program: str | Path) -> Settings:
    """Settings for a fake, which cannot run in a jail: it needs Python."""
    return Settings(firecracker=str(program), jailer="")


class Bench:
    """Makes VMs of a fake Firecracker."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.made: list[FirecrackerVmm] = []

    def config(self, name: str) -> VmConfig:
        """Files for one VM."""
        directory = self.directory / name
        directory.mkdir()
        for file in ("memory", "image", "scratch", "app"):
            (directory / file).touch()
        os.truncate(directory / "memory", MiB)
        (directory / "vmlinux").write_bytes(b"\x7fELF")
        kernel = directory / "vmlinux"
        return vm_config(directory, kernel=kernel, initramfs=kernel)

    def create(self, name: str = "vm", **environment: str) -> FirecrackerVmm:
        """A VM in state NEW."""
        config = self.config(name)
        return self.create_with(config, **environment)

    def create_with(self, config: VmConfig, **environment: str) -> FirecrackerVmm:
        """A VM of just these files."""
        program = make_fake(config.directory, **environment)
        vmm = FirecrackerDriver(settings_of(program)).create(config)
        self.made.append(vmm)
        return vmm


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """All its VMs are dead after the test."""
    bench = Bench(tmp_path)
    yield bench
    for vmm in bench.made:
        await vmm.stop()
        assert vmm.process is None or not vmm.process.is_alive()


def assert_dead(vmm: FirecrackerVmm) -> None:
    """Nothing runs any more."""
    assert vmm.state is VmmState.DEAD
    assert vmm.process is None or not vmm.process.is_alive()


@pytest.mark.parametrize("step", BOOT_STEPS)
async def test_process_that_dies_at_each_step_of_a_boot(bench: Bench, step: str) -> None:
    """The error names the step; nothing is left running."""
    vmm = bench.create(FAKE_FIRECRACKER_DIES=step)
    with pytest.raises(VmmFailed, match=f"lost the connection to Firecracker at {step}"):
        await vmm.boot()
    assert_dead(vmm)


@pytest.mark.parametrize(
    ("step", "request_name"),
    [
        ("pause", "PATCH /vm"),
        ("save_state", "PUT /snapshot/create"),
        ("load", "PUT /snapshot/load"),
    ],
)
async def test_process_that_dies_inside_a_step(bench: Bench, step: str, request_name: str) -> None:
    """The same for what a running or a waiting VM is asked."""
    vmm = bench.create(FAKE_FIRECRACKER_DIES=request_name)
    await (vmm.start() if step == "load" else vmm.boot())
    if step == "save_state":
        await vmm.pause()
    (bench.directory / "state").touch()
    arguments = [] if step == "pause" else [bench.directory / "state"]
    with pytest.raises(VmmFailed, match=request_name):
        await getattr(vmm, step)(*arguments)
    assert_dead(vmm)


@pytest.mark.slow
async def test_socket_that_is_gone(bench: Bench) -> None:
    """A VM whose socket was removed cannot be asked any more and is ended, not lost."""
    vmm = bench.create()
    await vmm.boot()
    (vmm.config.directory / "jail/api.sock").unlink()
    with pytest.raises(VmmFailed, match=r"PATCH /vm: .*No such file"):
        await vmm.pause()
    assert_dead(vmm)


async def test_program_that_ends_at_once(bench: Bench) -> None:
    """What it printed is the reason."""
    vmm = bench.create()
    program = vmm.config.directory / "firecracker"
    script = program.read_text().replace(
        "exec", '[ "$1" = --version ] || { echo "bad luck"; exit 3; }\nexec'
    )
    program.write_text(script)
    with pytest.raises(VmmFailed, match="Firecracker ended at its start: bad luck"):
        await vmm.boot()
    assert_dead(vmm)


async def test_binary_that_is_missing_or_too_old(bench: Bench) -> None:
    """Nothing is started."""
    config = bench.config("a")
    vmm = FirecrackerDriver(settings_of("/nonexistent/f")).create(config)
    with pytest.raises(HostUnfit, match="no Firecracker binary"):
        await vmm.boot()
    assert vmm.process is None
    old = bench.create("b", FAKE_FIRECRACKER_VERSION="1.11.0")
    with pytest.raises(HostUnfit, match="too old"):
        await old.start()
    assert old.process is None


@pytest.mark.parametrize("version", ["1.12.0", "1.13.0", "1.14.0", "1.15.0", "1.16.1"])
async def test_each_version_gets_what_it_knows(bench: Bench, version: str) -> None:
    """Boot, save, load and go on: no version meets a field that it refuses."""
    first = bench.create("a", FAKE_FIRECRACKER_VERSION=version)
    await first.boot()
    await first.pause()
    await first.save_state(bench.directory / "state")
    second = bench.create("b", FAKE_FIRECRACKER_VERSION=version)
    await second.start()
    await second.load(bench.directory / "state")
    await second.resume()
    assert second.state is VmmState.RUNNING


def remove_kernel(config: VmConfig) -> None:
    """No kernel."""
    config.vmlinux.unlink()


def compress_kernel(config: VmConfig) -> None:
    """A kernel as Debian packages it."""
    config.vmlinux.write_bytes(b"MZ" + bytes(600) + b"HdrS")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_kernel, "there is no kernel .*vmlinux for Firecracker"),
        (compress_kernel, "is no ELF file: b'MZ"),
    ],
)
async def test_wrong_kernel(bench: Bench, spoil: Callable[[VmConfig], None], words: str) -> None:
    """Told before a process is started, with the command that mends it."""
    vmm = bench.create()
    spoil(vmm.config)
    with pytest.raises(HostUnfit, match=words) as raised:
        await vmm.boot()
    assert "torpor kernel install" in raised.value.hint
    assert vmm.process is None


async def test_machine_that_cannot_be(bench: Bench) -> None:
    """No process is started for it."""
    config = dataclasses.replace(bench.config("a"), machine=Machine(MiB + 1, 1, MiB, MiB))
    vmm = bench.create_with(config)
    with pytest.raises(InvalidInput, match="bytes of memory"):
        await vmm.boot()
    assert vmm.process is None


async def test_drive_that_is_not_there(bench: Bench) -> None:
    """Firecracker's own words come through."""
    vmm = bench.create()
    vmm.config.app.unlink()
    with pytest.raises(VmmFailed, match=r"PUT /drives/app: Drive config error: .*os error 2"):
        await vmm.boot()
    assert_dead(vmm)


async def test_device_state_of_another_vmm(bench: Bench) -> None:
    """QEMU's, say: refused in Firecracker's words, and the process that refused has ended."""
    vmm = bench.create()
    (bench.directory / "state").write_bytes(b"QEVM\0\0\0\x03" + bytes(20_000))
    await vmm.start()
    with pytest.raises(VmmFailed, match="PUT /snapshot/load: Load snapshot error"):
        await vmm.load(bench.directory / "state")
    assert_dead(vmm)


async def test_failed_save_loses_no_pages_of_a_booted_vm(bench: Bench) -> None:
    """After a snapshot that failed Firecracker tracks for nothing: the next one is whole."""
    vmm = bench.create()
    await vmm.boot()
    await vmm.pause()
    before = await vmm.copy_written_memory(bench.directory / "before")
    link = vmm.config.directory / "jail/saved/memory"
    place = link.readlink()
    link.unlink()
    link.symlink_to("/dev/full")
    with pytest.raises(VmmFailed, match="PUT /snapshot/create"):
        await vmm.save_state(bench.directory / "state")
    assert vmm.state is VmmState.PAUSED
    link.unlink()
    link.symlink_to(place)
    await vmm.save_state(bench.directory / "state")
    after = await vmm.copy_written_memory(bench.directory / "after")
    old, new = bytearray(MiB), bytearray(MiB)
    for memory, written in ((old, before), (new, after)):
        data, position = written.data.read_bytes(), 0
        for offset, length in written.pieces:
            memory[offset : offset + length] = data[position : position + length]
            position += length
    assert any(old)
    assert old == new


def saved_memory_bytes(vmm: FirecrackerVmm) -> int:
    """The length of the file that Firecracker has for memory."""
    assert vmm.process is not None
    place = str((vmm.config.directory / "jail/saved/memory").readlink())
    return Path(place.replace("self", str(vmm.process.pid))).stat().st_size


@pytest.mark.parametrize("order", ["state", "memory"])
async def test_device_state_alone(bench: Bench, order: str) -> None:
    """Of a restored VM no memory is written; by a version that opens memory first it is, in vain.

    Either way memory is what pagemap finds; what was asked for is no error that the log tells.
    """
    first = bench.create("a")
    await first.boot()
    await first.pause()
    state = bench.directory / "state"
    await first.save_state(state)
    vmm = bench.create("b", FAKE_FIRECRACKER_OPENS_FIRST=order)
    await vmm.start()
    await vmm.load(state)
    for number in range(2):
        await vmm.resume()
        saved = bench.directory / f"{number}"
        async with vmm.ready_to_freeze(saved, bench.directory / f"w{number}"):
            written = await vmm.freeze(
                saved, bench.directory / f"w{number}", step=contextlib.nullcontext
            )
            assert (saved_memory_bytes(vmm) > 0) == (order == "memory")
        assert saved_memory_bytes(vmm) == 0
        again = await vmm.copy_written_memory(bench.directory / f"again{number}")
        assert written.runs == again.runs
        assert saved.read_bytes() == state.read_bytes()
    if order == "state":
        assert "memory backing file" in vmm.config.vmm_log.read_text()
        assert vmm.last_words() == ""


async def test_full_disk_is_told_as_such(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while device state is moved to its place is NoSpace; the VM stays paused."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    vmm = bench.create()
    await vmm.boot()
    await vmm.pause()
    monkeypatch.setattr("torpor.vmm.firecracker.driver.copy_out", full)
    with pytest.raises(NoSpace):
        await vmm.save_state(bench.directory / "state")
    assert vmm.state is VmmState.PAUSED


async def test_adoption(bench: Bench) -> None:
    """Another object takes a VM over as it is; one that does not answer is not taken."""
    first = bench.create()
    await first.boot()
    process = first.process
    assert process is not None
    await first.detach()
    driver = FirecrackerDriver(settings_of(first.config.directory / "firecracker"))
    second = await driver.adopt(first.config, process)
    assert second.state is VmmState.RUNNING
    await second.pause()
    third = await driver.adopt(first.config, process)
    assert third.state is VmmState.PAUSED
    written = await third.copy_written_memory(bench.directory / "written")
    assert written.size_bytes > 0
    process.signal(signal.SIGKILL)
    assert process.wait(timeout_s=10)
    with pytest.raises(TorporError):
        await driver.adopt(first.config, process)


async def test_process_that_waits_is_not_adopted(bench: Bench) -> None:
    """A Firecracker in which nothing was started is no running VM."""
    vmm = bench.create()
    await vmm.start()
    assert vmm.process is not None
    driver = FirecrackerDriver(settings_of(vmm.config.directory / "firecracker"))
    with pytest.raises(VmmFailed, match="does not run: Not started"):
        await driver.adopt(vmm.config, vmm.process)
