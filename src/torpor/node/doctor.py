"""Can this host run torpor? One finding a line, each with what to do."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from torpor.errors import TorporError
from torpor.host import cpu, pagemap
from torpor.host.process import run
from torpor.image.kernel import load_boot
from torpor.units import GiB, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.config import Settings

Status = Literal["ok", "warning", "failure"]

_SETUP: Final = "run `make setup`, or install it with apt-get"
_PROGRAMS: Final = {
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "nsenter": "util-linux",
    "mmdebstrap": "mmdebstrap",
    "tar2sqfs": "squashfs-tools-ng",
    "mke2fs": "e2fsprogs",
    "cpio": "cpio",
    "gcc": "gcc",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, what was found, and what to do about it."""

    name: str
    status: Status
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """The finding for `--json`."""
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Look at everything. Blocking; never raises for what it finds."""
    return [
        check_root(os.geteuid()),
        check_kernel(os.uname().release, has_scan=pagemap.has_scan_ioctl()),
        check_accelerator(settings, cpu.flags(), kvm=Path("/dev/kvm").exists()),
        check_qemu(lambda: run([settings.qemu, "-M", "help"], timeout_s=20)),
        _check_guest_kernel(settings),
        check_device(Path("/dev/net/tun"), "tun", "modprobe tun", needed=True),
        check_device(
            Path("/dev/fuse"), "fuse", "modprobe fuse; later versions need it", needed=False
        ),
        check_rules(lambda: run(["nft", "list", "tables"], timeout_s=20)),
        *check_programs(shutil.which),
        check_space("home", settings.home, _free(settings.home)),
        check_space("boot_dir", settings.boot_dir, _free(settings.boot_dir)),
        check_memory(_available_bytes()),
        check_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]


def check_root(user: int) -> Finding:
    """Namespaces, taps and other processes' memory need root."""
    if user == 0:
        return Finding("user", "ok", "root")
    return Finding("user", "failure", f"user {user}", "run torpor as root")


def check_kernel(release: str, *, has_scan: bool) -> Finding:
    """Old kernels work, their pauses are longer."""
    if has_scan:
        return Finding("kernel", "ok", f"{release}, has PAGEMAP_SCAN")
    return Finding(
        "kernel",
        "warning",
        f"{release}, no PAGEMAP_SCAN",
        "pauses grow with memory size; Linux 6.7 has it",
    )


def check_accelerator(settings: Settings, flags: frozenset[str], *, kvm: bool) -> Finding:
    """KVM only where the CPU shows it: /dev/kvm may open where no guest can run."""
    able = bool(flags & {"vmx", "svm"})
    if settings.accelerator == "tcg" or not able:
        why = "set" if settings.accelerator == "tcg" else "the CPU flags show neither vmx nor svm"
        status: Status = "failure" if settings.accelerator == "kvm" else "warning"
        return Finding("accelerator", status, f"TCG, {why}", "guests run several times slower")
    if not kvm:
        return Finding("accelerator", "warning", "TCG, there is no /dev/kvm", "modprobe kvm")
    return Finding("accelerator", "ok", "KVM")


def check_qemu(ask: Callable[[], str]) -> Finding:
    """QEMU must be there and know the microvm machine."""
    try:
        machines = ask()
    except TorporError as error:
        return Finding("qemu", "failure", str(error), _SETUP)
    if "microvm" not in machines:
        return Finding("qemu", "failure", "it has no microvm machine", "install qemu-system-x86")
    return Finding("qemu", "ok", "has the microvm machine")


def check_device(path: Path, name: str, advice: str, *, needed: bool) -> Finding:
    """A device node."""
    if path.exists():
        return Finding(name, "ok", str(path))
    return Finding(name, "failure" if needed else "warning", f"there is no {path}", advice)


def check_rules(ask: Callable[[], str]) -> Finding:
    """nftables must work in this kernel."""
    try:
        ask()
    except TorporError as error:
        return Finding("nftables", "failure", str(error), "the kernel needs nf_tables")
    return Finding("nftables", "ok", "works")


def check_programs(which: Callable[[str], str | None]) -> list[Finding]:
    """Programs that torpor runs."""
    return [
        Finding(program, "ok", path)
        if (path := which(program))
        else Finding(program, "failure", "not installed", f"apt-get install {package}")
        for program, package in _PROGRAMS.items()
    ]


def check_space(name: str, path: Path, free_bytes: int) -> Finding:
    """Snapshots and images need room."""
    found = f"{format_size(free_bytes)} free at {path}"
    if free_bytes < GiB:
        return Finding(name, "failure", found, "free some space, or set another directory")
    if free_bytes < 5 * GiB:
        return Finding(name, "warning", found, "a few functions will fill it")
    return Finding(name, "ok", found)


def check_memory(available_bytes: int) -> Finding:
    """A guest needs its memory."""
    found = f"{format_size(available_bytes)} available"
    if available_bytes < GiB:
        return Finding("memory", "warning", found, "few instances will fit")
    return Finding("memory", "ok", found)


def check_limit(open_files: int) -> Finding:
    """Each instance takes a few descriptors."""
    if open_files < 1024:
        return Finding("open files", "warning", f"at most {open_files}", "raise `ulimit -n`")
    return Finding("open files", "ok", f"at most {open_files}")


def _check_guest_kernel(settings: Settings) -> Finding:
    try:
        return Finding("guest kernel", "ok", load_boot(settings.boot_dir).version)
    except TorporError as error:
        return Finding("guest kernel", "failure", str(error), "run `torpor kernel install`")


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
