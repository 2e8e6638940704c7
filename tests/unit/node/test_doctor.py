"""The doctor's findings: what is fine, what is a warning, what is a failure, and what to do."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from torpor.config import load_settings
from torpor.errors import HostUnfit, ProgramFailed
from torpor.image.kernel import BootFiles
from torpor.node import doctor
from torpor.units import Digest

TORPOR = Path(sys.executable).with_name("torpor")
TABLE = (
    *("user", "kernel", "cpu", "accelerator", "qemu", "guest kernel", "fuse", "tun", "nftables"),
    "firecracker",
    "FUSE resend",
    *("ip", "nft", "mmdebstrap", "home", "boot_dir", "memory", "open files", "processes"),
)
AMD, INTEL, NONE = (frozenset({"fpu", *flags}) for flags in (["svm"], ["vmx"], []))
NULL, ABSENT = Path("/dev/null"), Path("/dev/torpor-none")


def examine(**environ: str) -> tuple[int, dict[str, dict[str, str]]]:
    """`torpor doctor --json`: exit code and findings by name."""
    answer = subprocess.run(
        [TORPOR, "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        check=False,
    )
    return answer.returncode, {row["name"]: row for row in json.loads(answer.stdout)}


def test_every_line_of_the_table(tmp_path: Path) -> None:
    """Each thing has a line; what is not fine says what to do; exit 1 just when one fails."""
    code, findings = examine(TORPOR_HOME=str(tmp_path))
    assert set(TABLE) <= set(findings)
    for finding in findings.values():
        assert finding["status"] in ("ok", "warning", "failure")
        assert finding["found"]
        assert bool(finding["advice"]) == (finding["status"] != "ok"), finding
    failed = [name for name, finding in findings.items() if finding["status"] == "failure"]
    assert code == (1 if failed else 0), failed


@pytest.mark.parametrize(
    ("environ", "name", "words"),
    [
        ({"TORPOR_QEMU": "/nonexistent/qemu"}, "qemu", "is not installed"),
        ({"TORPOR_QEMU": "/bin/true"}, "qemu", "no microvm machine"),
        (
            {"TORPOR_VMM": "firecracker", "TORPOR_FIRECRACKER": "/nonexistent/f"},
            "firecracker",
            "there is no Firecracker binary /nonexistent/f",
        ),
        (
            {"TORPOR_VMM": "firecracker", "TORPOR_FIRECRACKER": "/bin/true"},
            "firecracker",
            "is no Firecracker",
        ),
        ({"TORPOR_BOOT_DIR": "/nonexistent"}, "guest kernel", "no guest kernel"),
        ({"TORPOR_HOME": "/proc/version/home"}, "home", "not a directory that can be written"),
    ],
)
def test_failure_exits_with_1(environ: dict[str, str], name: str, words: str) -> None:
    """A host that cannot run torpor: the line says what is wrong and the command exits 1."""
    code, findings = examine(**environ)
    assert code == 1
    assert findings[name]["status"] == "failure"
    assert words in findings[name]["found"]
    assert findings[name]["advice"]


def test_text_has_a_line_for_each_finding() -> None:
    """Without --json: status, name and what was found, then what to do."""
    answer = subprocess.run(
        [TORPOR, "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "TORPOR_QEMU": "/nonexistent/qemu"},
        check=False,
    )
    assert answer.returncode == 1
    assert "failure  qemu: /nonexistent/qemu is not installed\n         run `make" in answer.stdout


@pytest.mark.parametrize(
    ("setting", "flags", "device", "status", "words"),
    [
        ("auto", INTEL, NULL, "ok", "KVM"),
        ("auto", AMD, NULL, "ok", "KVM"),
        ("kvm", AMD, NULL, "ok", "KVM"),
        ("auto", NONE, NULL, "warning", "TCG: the CPU flags show neither vmx nor svm"),
        ("auto", AMD, ABSENT, "warning", "TCG: there is no /dev/torpor-none"),
        ("auto", AMD, Path("/proc/version"), "ok", "KVM"),
        ("auto", AMD, Path("/proc/self"), "warning", "TCG: /proc/self: Is a directory"),
        ("kvm", AMD, Path("/proc/self"), "failure", "KVM is set, but /proc/self: Is a directory"),
        ("kvm", NONE, NULL, "failure", "KVM is set, but the CPU flags"),
        ("kvm", AMD, ABSENT, "failure", "KVM is set, but there is no"),
        ("tcg", AMD, NULL, "warning", "TCG, as set"),
    ],
)
def test_accelerator_is_told_by_the_flags(
    setting: str, flags: frozenset[str], device: Path, status: str, words: str
) -> None:
    """KVM only where the flags show vmx or svm, even if /dev/kvm opens; asked in vain: failure."""
    finding = doctor.check_accelerator(setting, flags, device, probe=lambda device: "")
    assert (finding.status, words in finding.found) == (status, True), finding


@pytest.mark.parametrize(("setting", "status"), [("auto", "warning"), ("kvm", "failure")])
def test_device_that_opens_but_runs_nothing(setting: str, status: str) -> None:
    """Flags, and a device that is no KVM: TCG if that is left open, else a failure; and why."""
    finding = doctor.check_accelerator(setting, AMD, NULL)
    assert finding.status == status
    assert "/dev/null opens, but runs no guest: Inappropriate ioctl" in finding.found


def test_kernel_and_processor() -> None:
    """Old kernels fail, kernels without the scan are slower; other processors fail."""
    assert doctor.check_kernel("6.12.1+deb", has_scan=True).status == "ok"
    assert doctor.check_kernel("6.1.0-28-amd64", has_scan=False).status == "warning"
    assert doctor.check_kernel("5.6", has_scan=False).status == "warning"
    assert doctor.check_kernel("5.4.0-1", has_scan=False).status == "failure"
    assert doctor.check_processor("x86_64", INTEL).status == "ok"
    assert doctor.check_processor("x86_64", NONE).status == "warning"
    assert doctor.check_processor("aarch64", AMD).status == "failure"


def test_devices_are_opened(tmp_path: Path) -> None:
    """A device that is there but does not open is as good as none; fuse is not needed yet."""
    assert doctor.check_device(NULL, "tun", "load it", needed=True).status == "ok"
    for path, needed, status in (
        (ABSENT, True, "failure"),
        (ABSENT, False, "warning"),
        (tmp_path, True, "failure"),
    ):
        finding = doctor.check_device(path, "tun", "load it", needed=needed)
        assert (finding.status, finding.advice) == (status, "load it")


def test_programs_rules_and_user() -> None:
    """Missing programs name their package; rules that the kernel refuses are a failure."""
    found = doctor.check_programs(lambda name: None if name == "tar2sqfs" else f"/bin/{name}")
    (missing,) = [finding for finding in found if finding.status == "failure"]
    assert (missing.name, missing.advice) == ("tar2sqfs", "apt-get install squashfs-tools-ng")

    def refuse() -> str:
        raise ProgramFailed("nft exited with status 1", reason="no nat here")

    def lack(*_: str) -> str:
        raise HostUnfit("qemu is not installed")

    assert "no nat here" in doctor.check_rules(refuse).found
    assert doctor.check_rules(lambda: "").status == "ok"
    assert doctor.check_qemu(lack).status == "failure"
    assert doctor.check_root(1000).status == "failure"
    assert doctor.check_root(0).status == "ok"


def test_firecracker() -> None:
    """Needed only when it is set; else the line says why QEMU is taken."""

    def lack() -> str:
        raise HostUnfit("there is no Firecracker binary f", hint="docs/firecracker.md")

    def unable() -> None:
        raise HostUnfit("/dev/kvm cannot be opened", reason="Permission denied")

    def able() -> None:
        return None

    check = functools.partial(doctor.check_firecracker, jailer=None)
    found = check("auto", able, lambda: "1.16.1")
    assert (found.status, found.found) == ("ok", "1.16.1, boots guests, without a jailer")
    jailed = doctor.check_firecracker("auto", able, lambda: "1.16.1", jailer="/bin/jailer")
    assert jailed.found == "1.16.1, boots guests, in /bin/jailer"
    assert check("qemu", unable, lack).status == "ok"
    for need_kvm, ask, words in (
        (able, lack, "no Firecracker binary"),
        (unable, lambda: "1.16.1", "Permission denied"),
    ):
        assert check("auto", need_kvm, ask).found.startswith("not used: ")
        finding = check("firecracker", need_kvm, ask)
        assert finding.status == "failure"
        assert words in finding.found
        assert finding.advice


def test_jail() -> None:
    """A home where the jailer can make no device, or run no program, is told with the option."""
    home = Path("/var/lib/torpor")
    assert doctor.check_jail(os.ST_NOSUID, home).status == "ok"
    for flags, options in (
        (os.ST_NODEV | os.ST_NOSUID, "nodev"),
        (os.ST_NODEV | os.ST_NOEXEC, "nodev, noexec"),
    ):
        finding = doctor.check_jail(flags, home)
        assert finding.status == "failure"
        assert finding.found.endswith(f"in /var/lib/torpor: {options}")
        assert finding.advice


@pytest.mark.parametrize(
    ("vmm", "usable", "status"),
    [
        ("auto", True, "failure"),
        ("auto", False, "ok"),
        ("firecracker", False, "failure"),
        ("qemu", True, "ok"),
    ],
)
def test_guest_kernel_without_elf_form(
    vmm: str, usable: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that Firecracker cannot load fails where Firecracker would boot guests."""
    digest = Digest("0" * 64)
    boot = BootFiles(ABSENT, tmp_path / "vmlinux", ABSENT, digest, digest, "6.1")
    monkeypatch.setattr(doctor, "load_boot", lambda directory: boot)
    monkeypatch.setattr(doctor, "is_usable", lambda settings: usable)
    finding = doctor.check_guest_kernel(load_settings({"vmm": vmm}, environ={}))
    assert finding.status == status
    assert bool(finding.advice) == (status == "failure")


def test_limits_and_memory() -> None:
    """Low limits warn with the option that raises them; none at all is fine."""
    low = doctor.check_limits(lambda _: 256)
    assert {finding.status for finding in low} == {"warning"}
    assert [finding.advice for finding in low] == [
        f"raise `ulimit {x}`" for x in ("-n", "-u", "-f")
    ]
    assert {f.status for f in doctor.check_limits(lambda _: resource.RLIM_INFINITY)} == {"ok"}
    assert doctor.check_memory(1 << 29).status == "warning"
    assert doctor.check_memory(1 << 31).status == "ok"


def test_fuse_resend() -> None:
    """Old kernels are a warning that says who ends; without FUSE another, as wakes take longer."""

    def cannot() -> bool:
        raise HostUnfit("cannot mount at /x", reason="Operation not permitted")

    assert doctor.check_resend(lambda: True).status == "ok"
    old = doctor.check_resend(lambda: False)
    assert old.status == "warning"
    assert "ends its instances" in old.found
    assert "6.9" in old.advice
    assert "TORPOR_LAZY=no" in old.advice
    without = doctor.check_resend(cannot)
    assert without.status == "warning"
    assert "cannot mount at /x" in without.found
    assert "fetched whole" in without.advice
