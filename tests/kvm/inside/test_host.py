"""What torpor says of a host that has KVM; runs in level 1 only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torpor.config import Settings
from torpor.errors import HostUnfit
from torpor.host import cpu
from torpor.node import doctor
from torpor.units import Digest
from torpor.vmm.qemu.driver import QemuDriver


def test_doctor_says_kvm() -> None:
    """Flags, device and a guest of one instruction: doctor is content."""
    finding = doctor.check_accelerator("auto", cpu.flags(), cpu.KVM_DEVICE)
    assert (finding.status, finding.found) == ("ok", "KVM")


def test_model_that_this_processor_lacks() -> None:
    """A CPU model that this host cannot show is refused with the names of what it lacks."""
    driver = QemuDriver(Settings(cpu_model="Skylake-Server-v1"))
    with pytest.raises(HostUnfit, match="avx512f"):
        driver.platform(Digest("0" * 64))
    platform = QemuDriver(Settings(cpu_model="base")).platform(Digest("0" * 64))
    assert (platform.cpu_model, platform.cpu_flags, platform.cpuid) == ("base", (), ())


def test_kvm_without_permission() -> None:
    """A user who may not open /dev/kvm gets TCG by auto, and is told why when KVM is set."""
    answers = [ask_as_nobody(f"choose_accelerator({setting!r})") for setting in ("auto", "kvm")]
    assert answers == ["tcg", "this host cannot run KVM guests: /dev/kvm: Permission denied"]


def test_flags_without_kvm() -> None:
    """A processor that shows svm where nothing answers for it: TCG by auto, and why not KVM."""
    subprocess.run(["modprobe", "--remove", "kvm-amd"], check=True)
    try:
        assert "svm" in cpu.flags()
        for setting, status in (("auto", "warning"), ("kvm", "failure")):
            finding = doctor.check_accelerator(setting, cpu.flags(), cpu.KVM_DEVICE)
            assert (finding.status, "no /dev/kvm" in finding.found) == (status, True)
    finally:
        subprocess.run(["modprobe", "kvm-amd", "nested=0"], check=True)
    assert cpu.find_kvm_problem(cpu.flags(), cpu.KVM_DEVICE) == ""


def ask_as_nobody(call: str) -> str:
    """What a function of host.cpu answers or raises in a process of the user nobody."""
    program = (
        "from torpor.errors import HostUnfit\n"
        "from torpor.host.cpu import choose_accelerator\n"
        f"try:\n    print({call})\n"
        "except HostUnfit as error:\n    print(f'{error.message}: {error.reason}')\n"
    )
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    answer = subprocess.run(
        [*user, sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    return answer.stdout.strip()
