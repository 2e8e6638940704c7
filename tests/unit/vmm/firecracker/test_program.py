"""Which binary is taken for a Firecracker, and what keeps one from running here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.firecracker import make_fake
from torpor.config import Settings
from torpor.errors import HostUnfit, InvalidInput
from torpor.host import cpu
from torpor.node.parts import choose_driver
from torpor.units import Digest
from torpor.vmm.firecracker.program import Version, find_version, parse_version, require_kvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAID = (
    "Firecracker v1.16.1\n\n2026-11-24T15:26:02.584021911 [anonymous-instance:main] Firecracker"
    " exiting successfully. exit_code=0\n"
)


def test_version() -> None:
    """What 1.16.1 prints, a development build, and the oldest."""
    assert parse_version(SAID) == Version(1, 16, 1)
    assert str(parse_version("Firecracker v1.17.0-dev\n")) == "1.17.0"
    assert parse_version("Firecracker v1.12.0") == Version(1, 12, 0)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Firecracker v1.11.9\n", "1.11.9 is too old: torpor needs 1.12"),
        ("Firecracker v0.25.2\n", "too old"),
        ("QEMU emulator version 7.2.22\n", "is no Firecracker: QEMU emulator"),
        ("", "is no Firecracker"),
    ],
)
def test_wrong_versions(said: str, words: str) -> None:
    """Each says what was found, and where to read on."""
    with pytest.raises(HostUnfit, match=words) as raised:
        parse_version(said)
    assert "docs/firecracker.md" in raised.value.hint


def test_binaries(tmp_path: Path) -> None:
    """None, one that does not run, another program; one that was replaced is asked again."""
    with pytest.raises(HostUnfit, match="there is no Firecracker binary /nonexistent/f"):
        find_version("/nonexistent/f")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o755)
    with pytest.raises(HostUnfit, match="cannot be run"):
        find_version(str(broken))
    with pytest.raises(HostUnfit, match="cannot be run"):
        find_version("/bin/false")
    fake = make_fake(tmp_path)
    assert str(find_version(fake)) == "1.16.1"
    make_fake(tmp_path, FAKE_FIRECRACKER_VERSION="1.12.0")
    os.utime(fake, ns=(1, 1))
    assert str(find_version(fake)) == "1.12.0"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[set[str], str], None]]:
    """Sets this host's CPU flags and what stands for /dev/kvm, which runs guests if it opens."""

    def set_host(flags: set[str], device: str) -> None:
        cpu.kvm_problem.cache_clear()
        monkeypatch.setattr(cpu, "flags", lambda: frozenset(flags))
        monkeypatch.setattr(cpu, "KVM_DEVICE", Path(device))
        monkeypatch.setattr(cpu, "run_halt", lambda device: "")
        monkeypatch.setattr(cpu, "guest_features", lambda: (("1.0.ecx", 1),))

    yield set_host
    cpu.kvm_problem.cache_clear()


def test_kvm(host: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """Flags without a device, a device without flags, no permission: each has its words."""
    host({"svm"}, "/dev/null")
    require_kvm("auto")
    with pytest.raises(InvalidInput, match="under KVM only"):
        require_kvm("tcg")
    host(set(), "/dev/null")
    with pytest.raises(HostUnfit, match="neither vmx nor svm"):
        require_kvm("auto")
    host({"vmx"}, "/nonexistent/kvm")
    with pytest.raises(HostUnfit, match="there is no /nonexistent/kvm"):
        require_kvm("kvm")
    host({"vmx"}, str(tmp_path))  # what does not open for writing, as root
    with pytest.raises(HostUnfit, match="Is a directory"):
        require_kvm("auto")


def test_which_vmm(host: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """`auto` boots Firecracker where it and KVM are; what is set is taken or said to be missing."""
    fake = make_fake(tmp_path)
    host({"svm"}, "/dev/null")
    assert choose_driver(Settings(firecracker=fake)).name == "firecracker"
    assert choose_driver(Settings(firecracker="/nonexistent")).name == "qemu"
    assert choose_driver(Settings(firecracker=fake, vmm="qemu")).name == "qemu"
    host(set(), "/dev/null")
    assert choose_driver(Settings(firecracker=fake)).name == "qemu"
    driver = choose_driver(Settings(firecracker=fake, vmm="firecracker"))
    with pytest.raises(HostUnfit, match="needs KVM"):
        driver.platform(Digest("0" * 64))


def test_platform_names_kind_and_version(host: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """A snapshot of another Firecracker, or of QEMU, differs in what the manifest says."""
    host({"svm", "sse2"}, "/dev/null")
    kernel = Digest("0" * 64)
    here = choose_driver(Settings(firecracker=make_fake(tmp_path))).platform(kernel)
    assert (here.vmm, here.vmm_version, here.accelerator) == ("firecracker", "1.16.1", "kvm")
    (tmp_path / "b").mkdir()
    other = make_fake(tmp_path / "b", FAKE_FIRECRACKER_VERSION="1.15.0")
    there = choose_driver(Settings(firecracker=other)).platform(kernel)
    assert there.differences(here) == ["vmm version is 1.15.0 in the snapshot, 1.16.1 on this host"]
