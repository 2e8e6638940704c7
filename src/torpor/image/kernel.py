"""Kernel and initramfs of every guest, made once per host from Debian's cloud kernel package.

A boot directory holds

    boot.json               what is here: package, version, digests (written last, by rename)
    vmlinuz-DIGEST          the kernel as the package has it
    initramfs-DIGEST        newc cpio: /init, the modules, the order to load them in
    modules-DIGEST/         the modules, so that a changed init needs no other kernel
    vmlinux-DIGEST          the kernel unpacked to an ELF file, where its form allows it

where DIGEST is the first 12 digits of the file's BLAKE3 digest (modules and vmlinux: the kernel's).
boot.json names the files that count; what it does not name is left over and removed by the next
install.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import blake3
import msgspec

from torpor.errors import Damaged, HostUnfit, ProgramFailed
from torpor.host.process import run
from torpor.image.vmlinux import write_vmlinux
from torpor.structs import prepared
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

META_PACKAGE: Final = "linux-image-cloud-amd64"

KERNEL_CMDLINE: Final = (
    "console=ttyS0 quiet panic=-1 reboot=t init_on_free=1 random.trust_cpu=on cryptomgr.notests"
)
"""What every guest boots with. Freed pages are zeroed, so that they are no part of a snapshot; a
panic resets the VM at once, which the VMM sees as its end. The self-tests of ciphers would take a
fifth of the boot."""

MODULES: Final = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "overlay", "squashfs")
"""The modules a guest needs, in this order; each is loaded after those it depends on."""

GUEST_SOURCES: Final = Path(__file__).parent / "guest"
COMPILER_FLAGS: Final = (
    *("-std=gnu17", "-O2", "-static", "-s"),
    *("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"),
)

_CPIO_FLAGS = (
    *("--create", "--quiet", "--null"),
    *("--format=newc", "--reproducible", "--owner=+0:+0"),
)
_HINT = "run `torpor kernel install`"
_RECORD = "boot.json"
_APT_HINT = "the Debian archive must be reachable; see /etc/apt/sources.list"


@dataclass(frozen=True)
class BootFiles:
    """What a VM boots. `version` is the kernel package's name and version.

    `vmlinux` is the kernel as an ELF file, for VMMs that load no other; it is not there when the
    package's form is one that torpor does not unpack.
    """

    kernel: Path
    vmlinux: Path
    initramfs: Path
    kernel_digest: Digest
    initramfs_digest: Digest
    version: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    digest: Digest
    size_bytes: int
    mtime_ns: int


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    package: str
    version: str
    kernel: _File
    initramfs: _File
    modules: str
    sources: Digest


def load_boot(boot_dir: Path) -> BootFiles:
    """The installed kernel and initramfs.

    A file whose size and modification time are as recorded is taken for unchanged, since hashing
    it for every command costs more than the command; otherwise its digest decides. Raises
    HostUnfit when nothing is installed, Damaged when a file is not the one that was installed.
    """
    record = _load_record(boot_dir)
    for file in (record.kernel, record.initramfs):
        _check_file(boot_dir, file, trust_mtime=True)
    return _boot_files(boot_dir, record)


def install_kernel(boot_dir: Path, *, progress: Callable[[str], None]) -> BootFiles:
    """Make the boot directory whole and return what is in it.

    Returns at once when it is whole and the guest's sources are those it was made from; makes a new
    initramfs with the installed kernel when only the sources changed; otherwise takes the newest
    kernel that the host's apt sources offer. `progress` gets a line for each step. Blocking; other
    installs of the same directory wait. Raises HostUnfit, ProgramFailed (with apt's or gcc's
    words). On failure the directory is as before.
    """
    with _locked(boot_dir):
        record = _usable_record(boot_dir)
        if record is None or record.sources != hash_sources():
            with tempfile.TemporaryDirectory(dir=boot_dir, prefix="install-") as work:
                record = _install(boot_dir, Path(work), record, progress)
            _remove_leftovers(boot_dir, record)
        boot = _boot_files(boot_dir, record)
        _unpack_kernel(boot, progress)
        return boot


def _unpack_kernel(boot: BootFiles, progress: Callable[[str], None]) -> None:
    """The ELF kernel beside the packaged one; a form that is not known is no failure for QEMU."""
    if boot.vmlinux.exists():
        return
    progress("unpacking the kernel to an ELF file")
    try:
        write_vmlinux(boot.kernel, boot.vmlinux)
    except HostUnfit as error:
        progress(f"no kernel for Firecracker: {error}")


def hash_sources() -> Digest:
    """The digest of all that the initramfs is made from besides the kernel package."""
    state = blake3.blake3(repr((MODULES, COMPILER_FLAGS)).encode())
    for path in sorted(GUEST_SOURCES.glob("*.[ch]")):
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode() + content)
    return Digest(state.hexdigest())


def compile_init(target: Path) -> None:
    """Compile the guest's init, static. Raises HostUnfit without gcc, ProgramFailed."""
    sources = sorted(path.name for path in GUEST_SOURCES.glob("*.c"))
    run(
        ["gcc", *COMPILER_FLAGS, "-o", target, *sources],
        cwd=GUEST_SOURCES,
        hint="the C compiler and libc6-dev are needed: apt-get install gcc libc6-dev",
    )


def build_initramfs(modules: Sequence[Path], stage: Path, target: Path) -> None:
    """Write the initramfs with these modules, loaded in this order; `stage` must not exist.

    Same init, same modules: same bytes. Not compressed: that boots fastest.
    """
    (stage / "lib/modules").mkdir(parents=True)
    for module in modules:
        shutil.copyfile(module, stage / "lib/modules" / module.name)
    order = "".join(f"/lib/modules/{module.name}\n" for module in modules)
    (stage / "lib/modules-load-order").write_text(order)
    compile_init(stage / "init")
    entries = sorted(stage.rglob("*"))
    for entry in entries:
        entry.chmod(0o755 if entry.is_dir() or entry.name == "init" else 0o644)
    for entry in reversed(entries):
        os.utime(entry, ns=(0, 0))
    names = b"".join(bytes(entry.relative_to(stage)) + b"\0" for entry in entries)
    run(
        ["cpio", *_CPIO_FLAGS, "--file", target],
        input_bytes=names,
        cwd=stage,
    )


def find_modules(tree: Path, wanted: Sequence[str]) -> list[Path]:
    """The wanted modules below `tree` and all they depend on, each after its dependencies.

    Raises HostUnfit when the kernel neither has a module nor has it built in.
    """
    files = {_module_name(path.stem): path for path in tree.rglob("*.ko")}
    built_in = {
        _module_name(Path(line).stem)
        for listing in tree.rglob("modules.builtin")
        for line in listing.read_text().splitlines()
    }
    found: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None and name not in built_in:
            raise HostUnfit(f"the kernel package has no module {name}")
        if path is None or path in found:
            return
        for dependency in _dependencies(path):
            add(dependency)
        found.append(path)

    for name in wanted:
        add(_module_name(name))
    return found


def _module_name(text: str) -> str:
    return text.replace("-", "_")


def _dependencies(module: Path) -> list[str]:
    """The `depends=` entry of a module's .modinfo section, which modpost wrote."""
    entry = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    names = entry[1].decode().split(",") if entry else []
    return [_module_name(name) for name in names if name]


def _install(
    boot_dir: Path, work: Path, usable: _Record | None, progress: Callable[[str], None]
) -> _Record:
    package, version, kernel, modules = (
        _unpack_package(work, progress)
        if usable is None
        else (
            usable.package,
            usable.version,
            boot_dir / usable.kernel.name,
            _read_order(boot_dir / usable.modules),
        )
    )
    progress("building the initramfs")
    initramfs = work / "initramfs"
    build_initramfs(modules, work / "stage", initramfs)
    kernel_digest = _hash_file(kernel)
    record = _Record(
        package=package,
        version=version,
        kernel=_adopt(kernel, boot_dir, "vmlinuz"),
        initramfs=_adopt(initramfs, boot_dir, "initramfs"),
        modules=_adopt_modules(modules, boot_dir / f"modules-{kernel_digest[:12]}"),
        sources=hash_sources(),
    )
    _replace(boot_dir / _RECORD, msgspec.json.format(msgspec.json.encode(record), indent=2))
    return record


def _unpack_package(
    work: Path, progress: Callable[[str], None]
) -> tuple[str, str, Path, list[Path]]:
    """Package name, version, kernel and modules, in load order, of the newest cloud kernel."""
    progress(f"fetching {META_PACKAGE}")
    deb = _download(work, progress)
    package, version = _package_field(deb, "Package"), _package_field(deb, "Version")
    progress(f"unpacking {package} {version}")
    tree = work / "package"
    run(["dpkg-deb", "--extract", deb, tree])
    kernels = list((tree / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise HostUnfit(f"package {package} {version} has {len(kernels)} kernels")
    return package, version, kernels[0], find_modules(tree / "lib/modules", MODULES)


def _package_field(deb: Path, field: str) -> str:
    return run(["dpkg-deb", "--field", deb, field]).strip()


def _download(work: Path, progress: Callable[[str], None]) -> Path:
    """Fetch the package that the meta package stands for; refresh apt's lists if need be."""
    try:
        _fetch_package(work)
    except (ProgramFailed, HostUnfit):
        progress("refreshing apt's package lists")
        run(["apt-get", "--quiet", "update"], hint=_APT_HINT)
        _fetch_package(work)
    return next(work.glob("*.deb"))


def _fetch_package(work: Path) -> None:
    depends = run(["apt-cache", "depends", META_PACKAGE], hint=_APT_HINT)
    found = re.search(r"^\s*Depends: (linux-image-\d\S+)$", depends, re.MULTILINE)
    if found is None:
        raise HostUnfit(f"apt knows no package {META_PACKAGE}", hint=_APT_HINT)
    # The directory is readable by root only, so apt's unprivileged downloader cannot be used.
    options = ["--quiet", "--option", "APT::Sandbox::User=root"]
    run(["apt-get", *options, "download", found[1]], cwd=work, hint=_APT_HINT)


def _adopt(path: Path, boot_dir: Path, kind: str) -> _File:
    """Move or keep a file under the name that its digest gives it."""
    digest = _hash_file(path)
    target = boot_dir / f"{kind}-{digest[:12]}"
    if path != target:
        path.chmod(0o644)
        path.replace(target)
    found = target.stat()
    return _File(target.name, digest, found.st_size, found.st_mtime_ns)


def _adopt_modules(modules: Sequence[Path], target: Path) -> str:
    """Keep the modules with their order; a directory of that name already has the same ones."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="install-") as work:
            kept = Path(work) / "modules"
            kept.mkdir()
            for module in modules:
                shutil.copyfile(module, kept / module.name)
            (kept / "order").write_text("".join(f"{module.name}\n" for module in modules))
            kept.rename(target)
    return target.name


def _read_order(modules: Path) -> list[Path]:
    return [modules / name for name in (modules / "order").read_text().splitlines()]


def _usable_record(boot_dir: Path) -> _Record | None:
    """The record if all it names is there and right, so that no other kernel is needed."""
    try:
        record = _load_record(boot_dir)
        for file in (record.kernel, record.initramfs):
            _check_file(boot_dir, file, trust_mtime=False)
        found = all(path.is_file() for path in _read_order(boot_dir / record.modules))
    except (HostUnfit, Damaged, FileNotFoundError):
        return None
    return record if found else None


def _load_record(boot_dir: Path) -> _Record:
    path = boot_dir / _RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=prepared(_Record))
    except FileNotFoundError:
        raise HostUnfit(f"no guest kernel is installed in {boot_dir}", hint=_HINT) from None
    except msgspec.MsgspecError as error:
        raise Damaged(f"{path} cannot be read", reason=str(error), hint=_HINT) from None


def _check_file(boot_dir: Path, file: _File, *, trust_mtime: bool) -> None:
    path = boot_dir / file.name
    try:
        found = path.stat()
    except FileNotFoundError:
        raise HostUnfit(f"{path} is missing", hint=_HINT) from None
    same = found.st_size == file.size_bytes
    if same and not (trust_mtime and found.st_mtime_ns == file.mtime_ns):
        same = _hash_file(path) == file.digest
    if not same:
        raise Damaged(f"{path} is not the file that was installed", hint=_HINT)


def _boot_files(boot_dir: Path, record: _Record) -> BootFiles:
    return BootFiles(
        kernel=boot_dir / record.kernel.name,
        vmlinux=boot_dir / f"vmlinux-{record.kernel.digest[:12]}",
        initramfs=boot_dir / record.initramfs.name,
        kernel_digest=record.kernel.digest,
        initramfs_digest=record.initramfs.digest,
        version=f"{record.package} {record.version}",
    )


def _hash_file(path: Path) -> Digest:
    return Digest(blake3.blake3().update_mmap(path).hexdigest())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(path)


def _remove_leftovers(boot_dir: Path, record: _Record) -> None:
    kept = {_RECORD, "lock", record.kernel.name, record.initramfs.name, record.modules}
    kept.add(f"vmlinux-{record.kernel.digest[:12]}")
    for path in boot_dir.iterdir():
        if path.name in kept or not re.match(
            r"(vmlinuz|vmlinux|initramfs|modules|install)-", path.name
        ):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _locked(boot_dir: Path) -> Iterator[None]:
    boot_dir.mkdir(parents=True, exist_ok=True)
    with (boot_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
