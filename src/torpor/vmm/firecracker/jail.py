"""A directory in which every Firecracker process finds the same names.

Below the instance's directory, `jail` holds links to the VM's files, the API socket and what
Firecracker writes; it is the process's working directory. Device state names files relative to it,
so a snapshot restores in any other. With Firecracker's jailer it is more than that: see `jailer`.

What Firecracker writes it synchronizes before it answers, and its guest stands still meanwhile. So
it goes to memory: to files without a name, which Firecracker inherits and which go with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.vmm.firecracker.requests import (
    DRIVES,
    INITRAMFS,
    KERNEL,
    LOADED_STATE,
    MEMORY,
    SAVED,
    SAVED_MEMORY,
    SAVED_STATE,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torpor.vmm.interface import VmConfig

SOCKET: Final = "api.sock"
LEVEL: Final = ("--level", "Warn")


def named_files(config: VmConfig) -> dict[str, Path]:
    """What Firecracker reads, by the names under which it does."""
    files = {name: getattr(config, name) for name, _ in DRIVES}
    return files | {MEMORY: config.memory, KERNEL: config.vmlinux, INITRAMFS: config.initramfs}


@dataclass(frozen=True)
class Jail:
    """The working directory of one Firecracker process that runs as we do."""

    directory: Path

    @classmethod
    def of(cls, config: VmConfig) -> Jail:
        """The jail of a VM, which may not be made yet."""
        return cls(config.directory / "jail")

    @property
    def socket(self) -> Path:
        """The API's socket."""
        return self.directory / SOCKET

    @property
    def lost_memory(self) -> Path:
        """It is there after a snapshot that failed: the next one is to be whole."""
        return self.directory / "memory.lost"

    def open_saved(self, pid: int, name: str) -> int:
        """Open what the process of that pid wrote under a name; for reading. Raises OSError."""
        return os.open(self._seen(pid, name), os.O_RDONLY | os.O_CLOEXEC)

    def drop_saved(self, pid: int, name: str) -> None:
        """Forget what the process of that pid wrote under a name. Never fails."""
        with contextlib.suppress(OSError):
            os.truncate(self._seen(pid, name), 0)

    @contextlib.contextmanager
    def made(self, config: VmConfig) -> Iterator[list[int]]:
        """Lay out the links of a VM; the descriptors that its process has to inherit. Blocking."""
        (self.directory / SAVED).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, path in named_files(config).items():
            self._link(name, path.absolute())
        with contextlib.ExitStack() as stack:
            descriptors = []
            for name in (SAVED_STATE, SAVED_MEMORY):
                descriptors.append(os.memfd_create(name, os.MFD_CLOEXEC))
                stack.callback(os.close, descriptors[-1])
                self._link(name, Path(f"/proc/self/fd/{descriptors[-1]}"))
            yield descriptors

    def prepare(self, config: VmConfig) -> Callable[[], None] | None:
        """What the thread that starts Firecracker has to do before; nothing."""
        return None

    def put_state(self, vmstate: Path) -> None:
        """Let Firecracker find device state to load. Blocking."""
        self._link(LOADED_STATE, vmstate.absolute())

    def command(self, config: VmConfig, program: str) -> list[str]:
        """The command line of Firecracker, to be run in the jail."""
        command = [program, "--api-sock", SOCKET]
        command += ["--log-path", os.path.relpath(config.vmm_log, self.directory), *LEVEL]
        if config.namespace is not None:
            command = ["nsenter", f"--net=/run/netns/{config.namespace}", "--", *command]
        return command

    def _seen(self, pid: int, name: str) -> Path:
        path = self.directory / name
        return Path(str(path.readlink()).replace("self", str(pid))) if path.is_symlink() else path

    def _link(self, name: str, path: Path) -> None:
        link = self.directory / name
        link.unlink(missing_ok=True)
        link.symlink_to(path)


def copy_out(descriptor: int, target: Path) -> None:
    """Copy what Firecracker wrote to its place, and close it. Blocking. Raises OSError."""
    with open(descriptor, "rb") as stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out)
