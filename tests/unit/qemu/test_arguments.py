"""What QEMU is asked for where a wrong word would be seen by nobody."""

from __future__ import annotations

from pathlib import Path

from torpor.snapshot.manifest import Machine
from torpor.units import MiB
from torpor.vmm.interface import VmConfig
from torpor.vmm.qemu.arguments import device_arguments

CONFIG = VmConfig(
    directory=Path("/vm"),
    machine=Machine(memory_bytes=128 * MiB, vcpus=1, scratch_bytes=64 * MiB, app_bytes=MiB),
    kernel=Path("/kernel"),
    vmlinux=Path("/vmlinux"),
    initramfs=Path("/initramfs"),
    command_line="quiet",
    memory=Path("/vm/memory"),
    image=Path("/image"),
    scratch=Path("/vm/scratch"),
    app=Path("/app"),
)


def test_only_the_scratch_disk_is_written_and_no_flush_of_it_reaches_the_host() -> None:
    """Image and app are shared by VMs; a guest that flushes waits for no disk of the host's."""
    words = device_arguments(CONFIG)
    given = [words[place + 1] for place, word in enumerate(words) if word == "-blockdev"]
    disks = {
        options["file.filename"]: options
        for options in (dict(part.split("=") for part in disk.split(",")) for disk in given)
    }
    assert {path: disk["read-only"] for path, disk in disks.items()} == {
        "/image": "on",
        "/vm/scratch": "off",
        "/app": "on",
    }
    assert disks["/vm/scratch"]["cache.no-flush"] == "on"
