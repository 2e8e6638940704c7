"""What QEMU is asked for where a wrong word would be seen by nobody."""

from __future__ import annotations

from pathlib import Path

from fixtures.configs import vm_config
from torpor.vmm.qemu.arguments import device_arguments


def test_only_the_scratch_disk_is_written_and_no_flush_of_it_reaches_the_host() -> None:
    """Image and app are shared by VMs; a guest that flushes waits for no disk of the host's."""
    words = device_arguments(vm_config(Path("/vm")))
    given = [words[place + 1] for place, word in enumerate(words) if word == "-blockdev"]
    disks = {
        options["file.filename"]: options
        for options in (dict(part.split("=") for part in disk.split(",")) for disk in given)
    }
    assert {path: disk["read-only"] for path, disk in disks.items()} == {
        "/vm/image": "on",
        "/vm/scratch": "off",
        "/vm/app": "on",
    }
    assert disks["/vm/scratch"]["cache.no-flush"] == "on"
