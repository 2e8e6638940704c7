"""QEMU's argument list, built from small pure functions.

What is given here decides the device state's layout: two VMs exchange snapshots only if the lists
of `machine_arguments` and `device_arguments` are the same but for file names. Sources: QEMU 7.2's
docs/system/i386/microvm.rst and qemu-options.hx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.vmm.interface import VmConfig

MACHINE_TYPES: Final = {"microvm-legacy-virtio": "on", "microvm": "off"}
"""What manifests call them, and whether their virtio transports are legacy ones.

The other ones save 1,024 queues of each device, however many it has: 240 KB and 3 ms in a
capture's pause under TCG, and as much at a load. New VMs are of the first type.
"""
NEW_MACHINE_TYPE: Final = next(iter(MACHINE_TYPES))
_MACHINE_OPTIONS: Final = "isa-serial=on,rtc=off,usb=off"


def cpu_argument(accelerator: str, cpu_model: str) -> str:
    """The -cpu value. QEMU 7.2's TCG breaks cmpxchg16b, so kernels of 6.5 and later crash.

    Of a named model KVM must give everything, or QEMU ends: guests of one model see the same.
    """
    if accelerator == "tcg":
        return f"{cpu_model},-cx16"
    return cpu_model if cpu_model == "host" else f"{cpu_model},enforce"


def machine_arguments(
    config: VmConfig, *, machine_type: str, accelerator: str, cpu_model: str
) -> list[str]:
    """The board, its CPUs, and its memory: a private mapping of the memory file."""
    accel = "tcg,thread=multi" if accelerator == "tcg" else accelerator
    memory = (
        f"memory-backend-file,id=ram,size={config.machine.memory_bytes},"
        f"mem-path={escape(config.memory)},share=off"
    )
    return [
        *("-M", f"microvm,{_MACHINE_OPTIONS},memory-backend=ram"),
        *("-accel", accel),
        *("-cpu", cpu_argument(accelerator, cpu_model)),
        *("-smp", str(config.machine.vcpus)),
        *("-m", f"size={config.machine.memory_bytes}b"),
        *("-object", memory),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        *("-global", f"virtio-mmio.force-legacy={MACHINE_TYPES[machine_type]}"),
        # without it device state that xen-save-devices-state wrote is refused at load
        *("-global", "migration.send-configuration=off"),
    ]


def kernel_arguments(config: VmConfig) -> list[str]:
    """The kernel that a VM boots."""
    return [
        *("-kernel", str(config.kernel)),
        *("-initrd", str(config.initramfs)),
        *("-append", config.command_line),
    ]


def restored_kernel_arguments(head: Path) -> list[str]:
    """What a restored guest never reads, but QEMU's board wants."""
    return ["-kernel", str(head)]


def device_arguments(config: VmConfig) -> list[str]:
    """Disks (image, scratch, app: vda, vdb, vdc), network, entropy, console."""
    return [
        *_disk("image", config.image, read_only=True),
        *_disk("scratch", config.scratch, read_only=False),
        *_disk("app", config.app, read_only=True),
        *("-netdev", _network_backend(config)),
        *("-device", f"virtio-net-device,netdev=net,mac={config.guest_mac}"),
        *("-object", "rng-random,id=entropy,filename=/dev/urandom"),
        *("-device", "virtio-rng-device,rng=entropy"),
        *("-chardev", f"file,id=console,path={escape(config.console_log)},append=on"),
        *("-serial", "chardev:console"),
    ]


def monitor_arguments(listener: int) -> list[str]:
    """QMP on a listening socket that the parent made, so that nobody waits for a path."""
    return [
        *("-chardev", f"socket,id=qmp,fd={listener},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
    ]


def escape(path: Path) -> str:
    """A file name inside a comma-separated option: commas are doubled."""
    return str(path).replace(",", ",,")


def _network_backend(config: VmConfig) -> str:
    if config.namespace is None:
        return "hubport,id=net,hubid=0"  # a card that is connected to nothing
    return f"tap,id=net,ifname={config.tap},script=no,downscript=no"


def _disk(node: str, path: Path, *, read_only: bool) -> list[str]:
    # a guest's flush need not reach the host's disk: no instance outlives a crash of its host
    flags = "read-only=on" if read_only else "read-only=off,discard=unmap,cache.no-flush=on"
    # no locking: clones share the image, and the scratch belongs to one instance's directory
    backend = f"driver=raw,node-name={node},{flags},file.driver=file,file.locking=off"
    return [
        *("-blockdev", f"{backend},file.filename={escape(path)}"),
        *("-device", f"virtio-blk-device,drive={node}"),
    ]
