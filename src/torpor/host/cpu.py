"""The host's processor: vendor, flags, and which accelerator can be used on it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torpor.errors import HostUnfit
from torpor.host.kvm import read_features, run_halt

if TYPE_CHECKING:
    from collections.abc import Callable

_CPUINFO = Path("/proc/cpuinfo")
KVM_DEVICE = Path("/dev/kvm")
VIRTUALISATION = frozenset({"vmx", "svm"})


@functools.lru_cache(maxsize=1)
def _info() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def vendor() -> str:
    """`GenuineIntel`, `AuthenticAMD`, or empty where the kernel tells none."""
    return _info().get("vendor_id", "")


def flags() -> frozenset[str]:
    """The CPU flags of /proc/cpuinfo."""
    return frozenset(_info().get("flags", "").split())


@functools.lru_cache(maxsize=1)
def guest_features() -> tuple[tuple[str, int], ...]:
    """What KVM shows guests of this processor by CPUID, see `kvm.read_features`. Raises OSError."""
    return read_features(KVM_DEVICE)


def find_kvm_problem(
    shown: frozenset[str], device: Path, *, probe: Callable[[Path], str] = run_halt
) -> str:
    """Why KVM runs no guest here, an empty string where it does.

    The flags come first: /dev/kvm may open, and run one instruction, where no ordinary guest runs.
    Where they are there, nested ones may still be unusable: a guest of one instruction tells.
    """
    if not shown & VIRTUALISATION:
        return "the CPU flags show neither vmx nor svm"
    if not device.exists():
        return f"there is no {device}"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device}: {error.strerror}"
    return probe(device)


@functools.lru_cache(maxsize=1)
def kvm_problem() -> str:
    """`find_kvm_problem` of this host, asked once in a process."""
    return find_kvm_problem(flags(), KVM_DEVICE, probe=run_halt)


def choose_accelerator(setting: Literal["auto", "tcg", "kvm"]) -> Literal["tcg", "kvm"]:
    """KVM where it runs guests, else TCG; see `find_kvm_problem`.

    Raises HostUnfit when KVM is asked for and cannot work.
    """
    if setting == "tcg":
        return "tcg"
    problem = kvm_problem()
    if problem and setting == "kvm":
        raise HostUnfit(
            "this host cannot run KVM guests",
            reason=problem,
            hint="use the accelerator auto or tcg; `torpor doctor` says more",
        )
    return "tcg" if problem else "kvm"
