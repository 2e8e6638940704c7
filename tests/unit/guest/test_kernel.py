"""Installing the guest's kernel, with a package made here in place of Debian's."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from torpor.errors import Damaged, HostUnfit, ProgramFailed
from torpor.host.tsc import measure_tsc_khz
from torpor.image import kernel

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

DEPENDS = {
    "virtio_ring": "",
    "virtio": "virtio_ring",
    "virtio_mmio": "virtio,virtio_ring",
    "virtio_blk": "virtio,virtio_ring",
    "failover": "",
    "net_failover": "failover",
    "virtio_net": "virtio_ring,virtio,net_failover",
    "virtio-rng": "virtio,virtio_ring",
    "overlay": "",
}
ORDER = [
    *("virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "failover", "net_failover"),
    *("virtio_net", "virtio-rng", "overlay"),
]


def make_modules(tree: Path) -> None:
    """A module tree with squashfs built in, everything else as files."""
    for name, depends in DEPENDS.items():
        path = tree / "kernel/drivers" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0")
    (tree / "modules.builtin").write_text("kernel/fs/squashfs/squashfs.ko\n")


def make_package(target: Path) -> None:
    """A .deb laid out like Debian's kernel package."""
    tree = target / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: linux-image-9.9-cloud-amd64\nVersion: 9.9-1\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: a test\n"
    )
    (tree / "boot").mkdir()
    (tree / "boot/vmlinuz-9.9-cloud-amd64").write_bytes(os.urandom(5000))
    make_modules(tree / "lib/modules/9.9-cloud-amd64")
    subprocess.run(
        ["dpkg-deb", "--build", tree, target / "linux-image.deb"], check=True, capture_output=True
    )


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Fetching makes a package instead; where it was fetched to."""
    fetched: list[Path] = []

    def fetch(work: Path) -> None:
        fetched.append(work)
        make_package(work)

    monkeypatch.setattr(kernel, "_fetch_package", fetch)
    return fetched


def install(boot_dir: Path) -> kernel.BootFiles:
    return kernel.install_kernel(boot_dir, progress=lambda _: None)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    """Dependencies first, built-in modules left out, each module once."""
    make_modules(tmp_path)
    found = kernel.find_modules(tmp_path, kernel.MODULES)
    assert [path.stem for path in found] == ORDER


def test_missing_module_is_named(tmp_path: Path) -> None:
    """A kernel without a module that guests need is refused by the module's name."""
    make_modules(tmp_path)
    (tmp_path / "kernel/drivers/net_failover.ko").unlink()
    with pytest.raises(HostUnfit, match="net_failover"):
        kernel.find_modules(tmp_path, kernel.MODULES)


def test_initramfs_is_reproducible(tmp_path: Path) -> None:
    """Two builds from the same modules and sources are the same bytes."""
    make_modules(tmp_path / "tree")
    modules = kernel.find_modules(tmp_path / "tree", kernel.MODULES)
    for name in ("first", "second"):
        kernel.build_initramfs(modules, tmp_path / f"stage-{name}", tmp_path / name)
    first = (tmp_path / "first").read_bytes()
    assert first == (tmp_path / "second").read_bytes()
    listing = subprocess.run(
        ["cpio", "--list", "--quiet"], input=first, capture_output=True, check=True
    )
    names = listing.stdout.decode().split()
    assert {"init", "lib/modules-load-order", "lib/modules/virtio_ring.ko"} <= set(names)


def test_install_and_load(tmp_path: Path, packaged: list[Path]) -> None:
    """An installed kernel loads with its digests; nothing of the work is left."""
    boot_dir = tmp_path / "boot"
    installed = install(boot_dir)
    assert kernel.load_boot(boot_dir) == installed
    assert installed.version == "linux-image-9.9-cloud-amd64 9.9-1"
    assert installed.kernel.stat().st_size == 5000
    digest = installed.kernel_digest[:12]
    assert sorted(path.name for path in boot_dir.iterdir()) == sorted(
        ["boot.json", "lock", f"vmlinuz-{digest}", f"modules-{digest}", installed.initramfs.name]
    )
    assert len(packaged) == 1


def test_second_install_does_nothing(tmp_path: Path, packaged: list[Path]) -> None:
    """With everything in place no package is fetched and no file is touched."""
    first = install(tmp_path)
    before = first.initramfs.stat().st_mtime_ns
    assert install(tmp_path) == first
    assert len(packaged) == 1
    assert first.initramfs.stat().st_mtime_ns == before


def test_changed_sources_keep_the_kernel(
    tmp_path: Path, packaged: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another init means another initramfs for the same kernel, without a download."""
    first = install(tmp_path)
    monkeypatch.setattr(kernel, "COMPILER_FLAGS", (*kernel.COMPILER_FLAGS, "-O1"))
    second = install(tmp_path)
    assert second.kernel_digest == first.kernel_digest
    assert second.initramfs_digest != first.initramfs_digest
    assert not first.initramfs.exists()
    assert len(packaged) == 1


@pytest.mark.parametrize("which", ["kernel", "initramfs"])
def test_altered_file_is_refused_and_replaced(
    tmp_path: Path, packaged: list[Path], which: str
) -> None:
    """A changed byte is found by load and mended by install."""
    path: Path = getattr(install(tmp_path), which)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(Damaged, match=path.name):
        kernel.load_boot(tmp_path)
    assert install(tmp_path) == kernel.load_boot(tmp_path)
    assert len(packaged) == 2


def test_missing_files_are_named(tmp_path: Path, packaged: list[Path]) -> None:
    """Without an install, and with a file gone, the hint is the command that mends it."""
    with pytest.raises(HostUnfit, match="no guest kernel") as nothing:
        kernel.load_boot(tmp_path / "nowhere")
    assert "torpor kernel install" in nothing.value.hint
    install(tmp_path).kernel.unlink()
    with pytest.raises(HostUnfit, match="vmlinuz"):
        kernel.load_boot(tmp_path)


def test_same_content_with_another_time_is_accepted(tmp_path: Path, packaged: list[Path]) -> None:
    """A copied boot directory loads: the digest decides when the time differs."""
    installed = install(tmp_path)
    os.utime(installed.kernel, ns=(5, 5))
    assert kernel.load_boot(tmp_path) == installed


def test_failed_install_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the archive cannot be reached the error says so and the directory stays empty."""
    commands = []

    def refuse(argv: list[object], **_: object) -> str:
        commands.append(str(argv[0]))
        raise ProgramFailed("apt-get exited with status 100", reason="no network", hint="archive")

    monkeypatch.setattr(kernel, "run", refuse)
    with pytest.raises(ProgramFailed, match="no network"):
        install(tmp_path)
    assert commands == ["apt-cache", "apt-get"]
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_counter_rate_is_stable() -> None:
    """Two measurements of the time-stamp counter agree to a thousandth."""
    first = measure_tsc_khz()
    measure_tsc_khz.cache_clear()
    second = measure_tsc_khz()
    if first is None or second is None:
        pytest.skip("this machine has no time-stamp counter")
    assert abs(first - second) < first / 1000
