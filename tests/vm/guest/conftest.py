"""A guest booted by QEMU under TCG, with an image that holds one static program."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from torpor.config import load_settings
from torpor.host.tsc import measure_tsc_khz
from torpor.image.agent import AGENT_PORT, AgentClient
from torpor.image.kernel import KERNEL_CMDLINE, BootFiles, install_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

FUNCTION_PORT = 8080
APP_BYTES = 4 * 1024**2
SCRATCH_BYTES = 64 * 1024**2
BOOT_TIMEOUT_S = 60


@dataclass
class Guest:
    """A running VM and where it can be reached."""

    process: subprocess.Popen[bytes]
    agent_port: int
    function_port: int
    scratch: Path
    app: Path
    boot_s: float = 0
    console: bytearray = field(default_factory=bytearray)

    @contextlib.contextmanager
    def client(self) -> Iterator[AgentClient]:
        """A client on a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.agent_port), timeout=20) as connection:
            yield AgentClient(connection, timeout_s=20)

    def ask(self, command: str) -> str:
        """What the probe, running as the function, answers."""
        address = ("127.0.0.1", self.function_port)
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(f"{command}\n".encode())
            received = b"".join(iter(lambda: connection.recv(4096), b""))
        return received.decode().strip()

    def read_console(self, pattern: str, *, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Read on until the console has shown `pattern`."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern.encode(), self.console):
            left_s = deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, left_s))
            piece = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            assert piece, f"no {pattern!r} on the console:\n{self.console.decode()}"
            self.console += piece


def make_squashfs(tree: Path, target: Path) -> None:
    tar = ["tar", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "-C", tree, "-c", "."]
    archive = subprocess.run(tar, check=True, capture_output=True).stdout
    subprocess.run(["tar2sqfs", "--quiet", "--force", target], input=archive, check=True)


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled test program."""
    target = tmp_path_factory.mktemp("probe") / "probe"
    source = Path(__file__).with_name("probe.c")
    subprocess.run(["gcc", "-O2", "-static", "-s", "-o", target, source], check=True)
    return target


@pytest.fixture(scope="session")
def image(probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with the probe and two wake hooks."""
    tree = tmp_path_factory.mktemp("image")
    (tree / "bin").mkdir()
    (tree / "etc/torpor/wake.d").mkdir(parents=True)
    for name in ("bin/probe", "etc/torpor/wake.d/10-first", "etc/torpor/wake.d/20-second"):
        shutil.copy(probe, tree / name)
    (tree / "srv").mkdir()
    (tree / "srv/of-image").write_text("image\n")
    (tree / "srv/replaced").write_text("image\n")
    target = tmp_path_factory.mktemp("disks") / "image"
    make_squashfs(tree, target)
    return target


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An app disk of fixed capacity."""
    tree = tmp_path_factory.mktemp("app")
    (tree / "srv").mkdir()
    (tree / "srv/of-app").write_text("app\n")
    (tree / "srv/replaced").write_text("app\n")
    target = tmp_path_factory.mktemp("disks") / "app"
    make_squashfs(tree, target)
    os.truncate(target, APP_BYTES)
    return target


@pytest.fixture(scope="session")
def boot_files() -> BootFiles:
    """The kernel of the settings' boot directory, installed if need be."""
    return install_kernel(load_settings().boot_dir, progress=lambda _: None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def disk(name: str, path: Path, *, mode: str) -> list[str]:
    options = {"r": "readonly=on", "w": "discard=unmap"}[mode]
    drive = f"if=none,id={name},file={path},format=raw,{options}"
    return ["-drive", drive, "-device", f"virtio-blk-device,drive={name}"]


def qemu_command(boot: BootFiles, image: Path, guest: Guest) -> list[str]:
    rate_khz = measure_tsc_khz()
    words = KERNEL_CMDLINE if rate_khz is None else f"{KERNEL_CMDLINE} tsc_early_khz={rate_khz}"
    network = (
        "user,id=net,net=172.16.0.0/24,host=172.16.0.1,"
        f"hostfwd=tcp:127.0.0.1:{guest.agent_port}-172.16.0.2:{AGENT_PORT},"
        f"hostfwd=tcp:127.0.0.1:{guest.function_port}-172.16.0.2:{FUNCTION_PORT}"
    )
    return [
        *("qemu-system-x86_64", "-M", "microvm", "-accel", "tcg", "-cpu", "max,-cx16"),
        *("-m", "128", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-serial", "stdio", "-global", "virtio-mmio.force-legacy=false"),
        *("-kernel", str(boot.kernel), "-initrd", str(boot.initramfs), "-append", words),
        *disk("image", image, mode="r"),
        *disk("scratch", guest.scratch, mode="w"),
        *disk("app", guest.app, mode="r"),
        *("-netdev", network, "-device", "virtio-net-device,netdev=net"),
        *("-device", "virtio-rng-device"),
    ]


@pytest.fixture
def guest(boot_files: BootFiles, image: Path, tmp_path: Path) -> Iterator[Guest]:
    """A booted guest whose app disk is still the empty placeholder."""
    scratch, placeholder = tmp_path / "scratch", tmp_path / "app"
    for path, size_bytes in ((scratch, SCRATCH_BYTES), (placeholder, APP_BYTES)):
        path.touch()
        os.truncate(path, size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", scratch], check=True)
    began = time.monotonic()
    guest = Guest(None, free_port(), free_port(), scratch, placeholder)  # type: ignore[arg-type]
    guest.process = subprocess.Popen(
        qemu_command(boot_files, image, guest),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with guest.process:
        try:
            guest.read_console(r"torpor: agent listens on 172\.16\.0\.2:1024\r?\n")
            guest.boot_s = time.monotonic() - began
            yield guest
        finally:
            guest.process.kill()
