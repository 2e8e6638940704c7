"""CPUID under KVM: what guests could see is recorded, and what another host lacks is named."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest

from torpor.host import kvm
from torpor.snapshot.manifest import Platform
from torpor.units import Digest

PLATFORM = Platform(
    "x86_64", "qemu", "7.2", "microvm", "kvm", "host", "AuthenticAMD", (), 4096, Digest("0" * 64)
)


def showing(**registers: int) -> Platform:
    """The platform with these registers, `7_0_ebx` for 7.0.ebx."""
    cpuid = tuple(
        (name.removeprefix("x").replace("_", "."), bits) for name, bits in registers.items()
    )
    return msgspec.structs.replace(PLATFORM, cpuid=cpuid)


def test_missing_bits_are_named() -> None:
    """Each register that has less on this host is named with the bits; more does no harm."""
    made = showing(x1_0_ecx=0b0111, x7_0_ebx=1 << 16 | 1 << 5, xd_0_eax=7)
    here = showing(x1_0_ecx=0b1111, x7_0_ebx=1 << 5)
    assert made.differences(here) == [
        "CPUID 7.0.ebx on this host lacks bit 16",
        "CPUID d.0.eax on this host lacks bits 0 1 2",
    ]
    assert made.differences(made) == []


def test_another_accelerator_says_enough() -> None:
    """Where the accelerator differs already, no list of bits follows."""
    here = msgspec.structs.replace(PLATFORM, accelerator="tcg")
    assert showing(x1_0_ecx=1).differences(here) == [
        "accelerator is kvm in the snapshot, tcg on this host"
    ]


def test_no_features_are_not_written() -> None:
    """Snapshots under TCG, and of a named model, have the manifest that they always had."""
    assert "cpuid" not in msgspec.json.decode(msgspec.json.encode(PLATFORM))
    shown = showing(x1_0_ecx=1)
    assert msgspec.json.decode(msgspec.json.encode(shown), type=Platform) == shown


def test_answer_of_kvm_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of KVM's answer the registers remain that have features, those without a bit set do not."""

    def answer(descriptor: int, request: int, into: bytearray) -> int:
        entries = [
            (0x0, 0, 0, 0x24, 1, 2, 3),  # the vendor's name
            (0x1, 0, 0, 0xA0671, 0x1020800, 0x81202000, 0xF8BFBFF),
            (0x7, 0, 1, 2, 0x1802852, 0, 0x20010000),
            (0x40000001, 0, 0, 0x1007EFB, 0, 0, 9),
        ]
        data = struct.pack("II", len(entries), 0)
        data += b"".join(struct.pack("7I12x", *entry) for entry in entries)
        into[: len(data)] = data
        return 0

    monkeypatch.setattr(kvm.fcntl, "ioctl", answer)
    assert kvm.read_features(Path("/dev/null")) == (
        ("1.0.ecx", 0x81202000),
        ("1.0.edx", 0xF8BFBFF),
        ("7.0.ebx", 0x1802852),
        ("7.0.edx", 0x20010000),
        ("40000001.0.eax", 0x1007EFB),
    )


def test_device_that_is_no_kvm() -> None:
    """What answers no such question is an error of the system's."""
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        kvm.read_features(Path("/dev/null"))
