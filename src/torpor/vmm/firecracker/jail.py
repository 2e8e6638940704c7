"""A directory in which every Firecracker process finds the same names.

Below the instance's directory, `jail` holds links to the VM's files, the API socket and what
Firecracker writes; it is the process's working directory. Device state names files relative to it,
so a snapshot restores in any other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.vmm.firecracker.requests import (
    DRIVES,
    INITRAMFS,
    KERNEL,
    LOADED_STATE,
    MEMORY,
    SAVED_MEMORY,
    SAVED_STATE,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.vmm.interface import VmConfig

_SOCKET: Final = "api.sock"


@dataclass(frozen=True)
class Jail:
    """The working directory of one Firecracker process."""

    directory: Path

    @classmethod
    def of(cls, config: VmConfig) -> Jail:
        """The jail of a VM, which may not be made yet."""
        return cls(config.directory / "jail")

    @property
    def socket(self) -> Path:
        """The API's socket."""
        return self.directory / _SOCKET

    @property
    def saved_state(self) -> Path:
        """Where Firecracker writes device state."""
        return self.directory / SAVED_STATE

    @property
    def saved_memory(self) -> Path:
        """Where Firecracker writes memory with it."""
        return self.directory / SAVED_MEMORY

    @property
    def lost_memory(self) -> Path:
        """It is there after a snapshot that failed: the next one is to be whole."""
        return self.directory / "memory.lost"

    def make(self, config: VmConfig) -> None:
        """Lay out the links of a VM. Blocking."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        files = {name: getattr(config, name) for name, _ in DRIVES}
        files |= {MEMORY: config.memory, KERNEL: config.vmlinux, INITRAMFS: config.initramfs}
        for name, path in files.items():
            self._link(name, path)

    def link_state(self, vmstate: Path) -> None:
        """Let Firecracker find device state to load. Blocking."""
        self._link(LOADED_STATE, vmstate)

    def command(self, config: VmConfig, program: str) -> list[str]:
        """The command line of Firecracker, to be run in the jail."""
        command = [program, "--api-sock", _SOCKET]
        command += ["--log-path", os.path.relpath(config.vmm_log, self.directory)]
        command += ["--level", "Warn"]
        if config.namespace is not None:
            command = ["nsenter", f"--net=/run/netns/{config.namespace}", "--", *command]
        return command

    def _link(self, name: str, path: Path) -> None:
        link = self.directory / name
        link.unlink(missing_ok=True)
        link.symlink_to(path.absolute())
