"""The host's processor: vendor, flags, and which accelerator can be used on it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

from torpor.errors import HostUnfit

_CPUINFO = Path("/proc/cpuinfo")
_KVM = Path("/dev/kvm")


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


def choose_accelerator(setting: Literal["auto", "tcg", "kvm"]) -> Literal["tcg", "kvm"]:
    """KVM if the flags show vmx or svm and /dev/kvm is there, else TCG.

    /dev/kvm alone proves nothing: it may open where no ordinary guest can run. Raises HostUnfit
    when KVM is asked for and cannot work.
    """
    able = bool(flags() & {"vmx", "svm"}) and _KVM.exists()
    if setting == "kvm" and not able:
        raise HostUnfit(
            "this host cannot run KVM guests",
            reason="its CPU flags show neither vmx nor svm, or /dev/kvm is missing",
            hint="use the accelerator auto or tcg",
        )
    return "kvm" if setting != "tcg" and able else "tcg"
