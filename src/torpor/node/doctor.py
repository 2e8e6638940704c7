"""Can this host run torpor? One finding a line, each with what to do."""

from __future__ import annotations

import os
import re
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from torpor.errors import TorporError
from torpor.host import cpu, pagemap
from torpor.host.fuse import connection
from torpor.host.kvm import run_halt
from torpor.host.process import run
from torpor.image.kernel import load_boot
from torpor.net import apply
from torpor.net.addresses import addresses_of
from torpor.units import GiB, format_size
from torpor.vmm.firecracker.jailer import find_jailer
from torpor.vmm.firecracker.program import find_version, is_usable, require_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.config import Settings

Status = Literal["ok", "warning", "failure"]

_OLDEST: Final = (5, 6)
"""The first Linux with all system calls that torpor makes: openat2(2), pidfd_open(2)."""
_SETUP: Final = "run `make setup`, or install it with apt-get"
_SLOW: Final = "guests run several times slower than under KVM"
_LIMITS: Final = (
    ("open files", resource.RLIMIT_NOFILE, 1024, "-n"),
    ("processes", resource.RLIMIT_NPROC, 1024, "-u"),
    ("file size", resource.RLIMIT_FSIZE, 64 * GiB, "-f"),
)
_PROGRAMS: Final = {
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "setpriv": "util-linux",
    "unshare": "util-linux",
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
        check_processor(os.uname().machine, cpu.flags()),
        check_accelerator(settings.accelerator, cpu.flags(), cpu.KVM_DEVICE),
        check_qemu(lambda *words: run([settings.qemu, *words], timeout_s=20)),
        check_firecracker(
            settings.vmm,
            lambda: require_kvm(settings.accelerator),
            lambda: str(find_version(settings.firecracker)),
            jailer=find_jailer(settings.jailer),
        ),
        *_check_jail(settings),
        check_guest_kernel(settings),
        check_device(Path("/dev/fuse"), "fuse", "modprobe fuse; the pager needs it", needed=False),
        check_resend(lambda: connection.probe().has_resend),
        check_device(Path("/dev/net/tun"), "tun", "modprobe tun", needed=True),
        check_rules(_try_rules),
        *check_programs(shutil.which),
        check_space("home", settings.home),
        check_space("boot_dir", settings.boot_dir),
        check_memory(_available_bytes()),
        *check_limits(lambda kind: resource.getrlimit(kind)[0]),
    ]


def check_root(user: int) -> Finding:
    """Namespaces, taps and other processes' memory need root."""
    if user == 0:
        return Finding("user", "ok", "root")
    return Finding("user", "failure", f"user {user}", "run torpor as root")


def check_kernel(release: str, *, has_scan: bool) -> Finding:
    """Before 6.7 pauses are longer, before `_OLDEST` nothing works."""
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if version < _OLDEST:
        return Finding("kernel", "failure", release, "torpor needs Linux 5.6 or later")
    if has_scan:
        return Finding("kernel", "ok", f"{release}, has PAGEMAP_SCAN")
    return Finding(
        "kernel",
        "warning",
        f"{release}, no PAGEMAP_SCAN",
        "pauses grow with memory size; Linux 6.7 has it",
    )


def check_processor(architecture: str, flags: frozenset[str]) -> Finding:
    """Guests are x86_64; the flags vmx or svm say whether the processor can run them itself."""
    if architecture != "x86_64":
        return Finding("cpu", "failure", architecture, "torpor runs on x86_64 only")
    able = sorted(flags & cpu.VIRTUALISATION)
    if able:
        return Finding("cpu", "ok", f"x86_64 with {', '.join(able)}")
    return Finding(
        "cpu",
        "warning",
        "x86_64, its flags show neither vmx nor svm",
        "enable virtualisation in the firmware, or nested virtualisation where this is a VM",
    )


def check_accelerator(
    setting: str,
    flags: frozenset[str],
    device: Path,
    *,
    probe: Callable[[Path], str] = run_halt,
) -> Finding:
    """Which accelerator guests get, by the rule of `cpu.find_kvm_problem`."""
    if setting == "tcg":
        return Finding("accelerator", "warning", "TCG, as set", _SLOW)
    problem = cpu.find_kvm_problem(flags, device, probe=probe)
    if problem and setting == "kvm":
        return Finding(
            "accelerator", "failure", f"KVM is set, but {problem}", "set auto or tcg, or mend that"
        )
    if problem:
        return Finding("accelerator", "warning", f"TCG: {problem}", _SLOW)
    return Finding("accelerator", "ok", "KVM")


def check_qemu(ask: Callable[..., str]) -> Finding:
    """QEMU must be there and know the microvm machine."""
    try:
        version = ask("--version").partition("\n")[0]
        machines = ask("-M", "help")
    except TorporError as error:
        return Finding("qemu", "failure", str(error), _SETUP)
    if "microvm" not in machines:
        return Finding("qemu", "failure", f"{version}: no microvm machine", _SETUP)
    return Finding("qemu", "ok", version)


def check_firecracker(
    setting: str, need_kvm: Callable[[], None], ask: Callable[[], str], *, jailer: str | None
) -> Finding:
    """Firecracker needs KVM and a binary; QEMU does where neither is, unless it is asked for."""
    name = "firecracker"
    if setting == "qemu":
        return Finding(name, "ok", "not used, as set")
    try:
        version = ask()
        need_kvm()
    except TorporError as error:
        if setting == "firecracker":
            advice = error.hint or "mend that, or set the VMM auto or qemu"
            return Finding(name, "failure", str(error), advice)
        return Finding(name, "ok", f"not used: {error}")
    where = f"in {jailer}" if jailer else "without a jailer"
    return Finding(name, "ok", f"{version}, boots guests, {where}")


def check_jail(flags: int, home: Path) -> Finding:
    """The jailer makes devices, and a copy of Firecracker, in home: by statvfs(3)'s `flags`."""
    refused = {"nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
    options = ", ".join(name for name, flag in refused.items() if flags & flag)
    if not options:
        return Finding("jail", "ok", f"{home} takes devices and programs")
    advice = 'set another home, mount that one without it, or set jailer = ""'
    return Finding("jail", "failure", f"the jailer cannot work in {home}: {options}", advice)


def check_device(path: Path, name: str, advice: str, *, needed: bool) -> Finding:
    """A device node, which opens only if its driver is there."""
    problem = _problem_with(path)
    if not problem:
        return Finding(name, "ok", str(path))
    return Finding(name, "failure" if needed else "warning", problem, advice)


def check_resend(ask: Callable[[], bool]) -> Finding:
    """Snapshots are served where FUSE can be mounted; whose requests can best be sent again."""
    name = "FUSE resend"
    try:
        has_resend = ask()
    except (TorporError, OSError) as error:
        advice = "run as root with fuse; until then snapshots are fetched whole before they wake"
        return Finding(name, "warning", f"cannot mount: {error}", advice)
    if has_resend:
        return Finding(name, "ok", "a pager that dies is replaced, its instances only wait")
    return Finding(
        name,
        "warning",
        "this kernel has none: a pager that dies ends its instances",
        "Linux 6.9 has it; until then TORPOR_LAZY=no makes instances independent of a pager",
    )


def check_rules(ask: Callable[[], str]) -> Finding:
    """nft must be there, and the kernel must have what a slot's rules use."""
    try:
        ask()
    except TorporError as error:
        return Finding("nftables", "failure", str(error), "install nftables; modprobe nf_tables")
    return Finding("nftables", "ok", "takes the rules of a network slot")


def check_programs(which: Callable[[str], str | None]) -> list[Finding]:
    """Programs that torpor runs."""
    return [
        Finding(program, "ok", path)
        if (path := which(program))
        else Finding(program, "failure", "not installed", f"apt-get install {package}")
        for program, package in _PROGRAMS.items()
    ]


def check_space(name: str, path: Path) -> Finding:
    """Snapshots and images need room, and a directory that can be written."""
    advice = "free some space, or set another directory"
    there = _existing(path)
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding(name, "failure", f"{there} is not a directory that can be written", advice)
    free_bytes = shutil.disk_usage(there).free
    found = f"{format_size(free_bytes)} free at {path}"
    if free_bytes < GiB:
        return Finding(name, "failure", found, advice)
    if free_bytes < 5 * GiB:
        return Finding(name, "warning", found, "a few functions will fill it")
    return Finding(name, "ok", found)


def check_memory(available_bytes: int) -> Finding:
    """A guest needs its memory."""
    found = f"{format_size(available_bytes)} available"
    if available_bytes < GiB:
        return Finding("memory", "warning", found, "few instances will fit")
    return Finding("memory", "ok", found)


def check_limits(limit: Callable[[int], int]) -> list[Finding]:
    """Each instance takes descriptors and threads, and has files as large as its memory."""
    findings = []
    for name, kind, wanted, option in _LIMITS:
        value = limit(kind)
        if value == resource.RLIM_INFINITY or value >= wanted:
            shown = "unlimited" if value == resource.RLIM_INFINITY else f"at most {value}"
            findings.append(Finding(name, "ok", shown))
        else:
            findings.append(
                Finding(name, "warning", f"at most {value}", f"raise `ulimit {option}`")
            )
    return findings


def check_guest_kernel(settings: Settings) -> Finding:
    """What guests boot; Firecracker wants an ELF form of it, which not every package allows."""
    try:
        boot = load_boot(settings.boot_dir)
        if not boot.vmlinux.exists() and _boots_firecracker(settings):
            found = f"{boot.version}, no ELF form of it for Firecracker"
            return Finding("guest kernel", "failure", found, "run `torpor kernel install`")
        return Finding("guest kernel", "ok", boot.version)
    except TorporError as error:
        return Finding("guest kernel", "failure", str(error), "run `torpor kernel install`")


def _boots_firecracker(settings: Settings) -> bool:
    return settings.vmm == "firecracker" or (settings.vmm == "auto" and is_usable(settings))


def _check_jail(settings: Settings) -> list[Finding]:
    if find_jailer(settings.jailer) is None or not _boots_firecracker(settings):
        return []
    return [check_jail(os.statvfs(_existing(settings.home)).f_flag, settings.home)]


def _existing(path: Path) -> Path:
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there


def _problem_with(device: Path) -> str:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device}: {error.strerror}"
    return ""


def _try_rules() -> str:
    """Let the kernel check a slot's rules without applying them."""
    rules = apply.rules(addresses_of(0)).encode()
    return run(["nft", "--check", "-f", "-"], input_bytes=rules, timeout_s=20)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
