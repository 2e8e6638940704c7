"""What KVM can do here: whether it runs a guest of one instruction, what it shows guests by CPUID.

Structures and numbers: Linux, Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_API_VERSION: Final = 12
_GET_API_VERSION: Final = 0xAE00
_CREATE_VM: Final = 0xAE01
_GET_VCPU_MMAP_SIZE: Final = 0xAE04
_CREATE_VCPU: Final = 0xAE41
_SET_TSS_ADDR: Final = 0xAE47
_SET_USER_MEMORY_REGION: Final = 0x4020AE46
_RUN: Final = 0xAE80
_GET_SUPPORTED_CPUID: Final = 0xC008AE05

_TSS_ADDRESS: Final = 0x7FFBD000
"""Three pages that the guest does not use; processors of Intel need them for real mode."""
_RESET_PAGE: Final = 0xFFFFF000
_RESET_OFFSET: Final = 0xFF0
_HALT: Final = 0xF4
_EXIT_REASON_OFFSET: Final = 8
_EXIT_HLT: Final = 5

_ENTRY: Final = struct.Struct("7I12x")
_MOST_ENTRIES: Final = 256
_FEATURES: Final = {
    (0x1, 0): ("ecx", "edx"),
    (0x7, 0): ("ebx", "ecx", "edx"),
    (0x7, 1): ("eax", "edx"),
    (0xD, 0): ("eax", "edx"),
    (0xD, 1): ("eax",),
    (0x40000001, 0): ("eax",),
    (0x80000001, 0): ("ecx", "edx"),
    (0x80000007, 0): ("edx",),
    (0x80000008, 0): ("ebx",),
}
"""Leaf and subleaf -> the registers in which each bit is a feature; 0x40000001 has KVM's own."""


def run_halt(device: Path) -> str:
    """Run a HLT where an x86 processor begins; why that failed, an empty string if it did not.

    Takes 2 ms. Blocking.
    """
    if platform.machine() != "x86_64":
        return f"guests are x86_64, the host is {platform.machine()}"
    try:
        reason = _run(device)
    except OSError as error:
        return f"{device} opens, but runs no guest: {error.strerror}"
    if reason != _EXIT_HLT:
        return f"{device} opens, but a guest of one instruction ends with reason {reason}"
    return ""


def read_features(device: Path) -> tuple[tuple[str, int], ...]:
    """The features that guests can see: a leaf's register, as `7.0.ebx` in hex, and its bits.

    What has no bit set is left out. Blocking. Raises OSError.
    """
    answer = bytearray(struct.pack("II", _MOST_ENTRIES, 0) + bytes(_MOST_ENTRIES * _ENTRY.size))
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, answer)
    finally:
        os.close(kvm)
    (count,) = struct.unpack_from("I", answer)
    return tuple(
        (f"{leaf:x}.{subleaf:x}.{name}", bits)
        for leaf, subleaf, _, *registers in _ENTRY.iter_unpack(answer[8 : 8 + count * _ENTRY.size])
        for name, bits in zip(("eax", "ebx", "ecx", "edx"), registers, strict=True)
        if bits and name in _FEATURES.get((leaf, subleaf), ())
    )


def _run(device: Path) -> int:
    with ExitStack() as stack:

        def closed(descriptor: int) -> int:
            stack.callback(os.close, descriptor)
            return descriptor

        kvm = closed(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        if fcntl.ioctl(kvm, _GET_API_VERSION, 0) != _API_VERSION:
            raise OSError(0, "it has another API than 12")
        vm = closed(fcntl.ioctl(kvm, _CREATE_VM, 0))
        fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS_ADDRESS)
        page = mmap.mmap(-1, mmap.PAGESIZE)
        page[_RESET_OFFSET] = _HALT
        content = ctypes.c_char.from_buffer(page)
        region = struct.pack("IIQQQ", 0, 0, _RESET_PAGE, mmap.PAGESIZE, ctypes.addressof(content))
        fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)
        vcpu = closed(fcntl.ioctl(vm, _CREATE_VCPU, 0))
        with mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0)) as shared:
            fcntl.ioctl(vcpu, _RUN, 0)
            (reason,) = struct.unpack_from("I", shared, _EXIT_REASON_OFFSET)
    return int(reason)
