"""What Firecracker is asked: bodies of API requests, pure functions.

Paths are names in the VM's working directory, and the same in every VM: Firecracker bakes them
into the device state, which has to load in another directory. The order of the drives is the
guest's: vda, vdb, vdc. Source: Firecracker's API description, versions 1.12 to 1.16; unknown
fields are refused by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torpor.errors import InvalidInput
from torpor.units import MiB

if TYPE_CHECKING:
    from torpor.vmm.firecracker.program import Version
    from torpor.vmm.interface import VmConfig

MOST_MEMORY_BYTES: Final = 3072 * MiB
"""Above it Firecracker splits guest memory into several mappings."""
MOST_CPUS: Final = 32

KERNEL: Final = "vmlinux"
INITRAMFS: Final = "initramfs"
MEMORY: Final = "memory"
DRIVES: Final = (("image", True), ("scratch", False), ("app", True))
"""Name and whether it is read-only."""
LOADED_STATE: Final = "vmstate"
SAVED: Final = "saved"
"""The directory of what it writes."""
SAVED_STATE: Final = f"{SAVED}/vmstate"
SAVED_MEMORY: Final = f"{SAVED}/memory"
NOWHERE: Final = "nowhere/memory"
"""A place for memory that cannot be opened, and what Firecracker says of it."""
NOT_OPENED: Final = "Cannot perform open on the memory backing file: No such file or directory"


@dataclass(frozen=True)
class Request:
    """One request: method, path and JSON body, None for no body."""

    method: str
    path: str
    body: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """How error messages call it."""
        return f"{self.method} {self.path}"


def boot_requests(config: VmConfig) -> list[Request]:
    """All requests from a fresh process to a running guest. Raises InvalidInput."""
    requests = [_machine(config), _kernel(config)]
    requests += [_drive(name, read_only=read_only) for name, read_only in DRIVES]
    if config.namespace is not None:
        card = {"iface_id": "net", "guest_mac": config.guest_mac, "host_dev_name": config.tap}
        requests.append(Request("PUT", "/network-interfaces/net", card))
    requests.append(Request("PUT", "/entropy", {}))
    requests.append(Request("PUT", "/actions", {"action_type": "InstanceStart"}))
    return requests


def load_request(version: Version) -> Request:
    """Load device state over the memory file, mapped privately; the VM stays paused."""
    body = {
        "snapshot_path": LOADED_STATE,
        "mem_backend": {"backend_type": "File", "backend_path": MEMORY},
        version.tracking_field: True,
        "resume_vm": False,
    }
    return Request("PUT", "/snapshot/load", body)


def save_request(*, whole: bool) -> Request:
    """Write the device state. Memory cannot be left out: if not `whole`, it is the least of it.

    That is what was written since the last such request, merged into its file if it is there.
    """
    body = {
        "snapshot_type": "Full" if whole else "Diff",
        "snapshot_path": SAVED_STATE,
        "mem_file_path": SAVED_MEMORY,
    }
    return Request("PUT", "/snapshot/create", body)


def save_state_request() -> Request:
    """Write the device state, and memory to a place that there is not.

    All versions write, flush and synchronize device state first. So this is refused with
    `NOT_OPENED` when that is done, and nothing has been done with memory.
    """
    body = {"snapshot_type": "Full", "snapshot_path": SAVED_STATE, "mem_file_path": NOWHERE}
    return Request("PUT", "/snapshot/create", body)


def run_request(*, paused: bool) -> Request:
    """Pause or resume."""
    return Request("PATCH", "/vm", {"state": "Paused" if paused else "Resumed"})


def _machine(config: VmConfig) -> Request:
    machine = config.machine
    if machine.memory_bytes % MiB or machine.memory_bytes > MOST_MEMORY_BYTES:
        raise InvalidInput(
            f"Firecracker guests cannot have {machine.memory_bytes} bytes of memory",
            hint="use whole MiB, at most 3 GiB, or the VMM qemu",
        )
    if machine.vcpus > MOST_CPUS:
        raise InvalidInput(f"Firecracker guests have at most {MOST_CPUS} CPUs")
    body = {
        "vcpu_count": machine.vcpus,
        "mem_size_mib": machine.memory_bytes // MiB,
        "smt": False,
        "track_dirty_pages": True,
    }
    return Request("PUT", "/machine-config", body)


def _kernel(config: VmConfig) -> Request:
    body = {
        "kernel_image_path": KERNEL,
        "initrd_path": INITRAMFS,
        "boot_args": config.command_line,
    }
    return Request("PUT", "/boot-source", body)


def _drive(name: str, *, read_only: bool) -> Request:
    # no root device: the initramfs mounts. Unsafe is about guests' flushes, which a crash of the
    # host makes void anyhow: instances do not outlive it
    body = {
        "drive_id": name,
        "path_on_host": name,
        "is_root_device": False,
        "is_read_only": read_only,
        "cache_type": "Unsafe",
    }
    return Request("PUT", f"/drives/{name}", body)
