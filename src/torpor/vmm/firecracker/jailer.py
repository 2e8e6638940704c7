"""Firecracker in its jailer: a root directory, a user and mounts of its own.

    INSTANCE/jail/firecracker/vm/root     Firecracker's /, owned by its user
        image scratch app memory ...      files of the host, mounted one by one
        saved                             a file system in memory for what Firecracker writes
        api.sock

The mounts are made in a mount namespace in which nothing but the jailer starts: they reach
nobody else and end with it. The jailer makes that root directory the only one, takes the user, and
becomes Firecracker, of the same pid. The user is no account of the host and no other instance's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.errors import VmmFailed
from torpor.vmm.firecracker.jail import LEVEL, SOCKET, Jail, named_files
from torpor.vmm.firecracker.requests import LOADED_STATE, SAVED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torpor.vmm.interface import VmConfig

_ID: Final = "vm"
_LOG: Final = "vmm.log"
_FIRST_USER: Final = 1 << 30
_USERS: Final = 1 << 29

_CLONE_NEWNS: Final = 0x20000
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SLAVE: Final = 1 << 19

_libc = ctypes.CDLL(None, use_errno=True)


def find_jailer(program: str) -> str | None:
    """Where the jailer is, if it is to be used: it is installed, and we run as root."""
    return shutil.which(program) if program and os.geteuid() == 0 else None


@dataclass(frozen=True)
class LockedJail(Jail):
    """The root directory of one Firecracker process in the jailer `jailer`."""

    base: Path
    jailer: str

    @classmethod
    def made_for(cls, config: VmConfig, jailer: str, program: str) -> LockedJail:
        """The jail of a VM that is to be started."""
        base = config.directory / "jail"
        return cls(base / Path(program).resolve().name / _ID / "root", base, jailer)

    @classmethod
    def found(cls, config: VmConfig) -> LockedJail | None:
        """The jail in which a VM runs, None if it has none."""
        base = config.directory / "jail"
        root = next(base.glob(f"*/{_ID}/root"), None)
        return None if root is None else cls(root, base, "")

    @property
    def lost_memory(self) -> Path:
        """See Jail; where Firecracker cannot write."""
        return self.base / "memory.lost"

    @contextlib.contextmanager
    def made(self, config: VmConfig) -> Iterator[list[int]]:
        """See Jail: places to mount at. All that is read becomes readable; home stays closed."""
        self.directory.mkdir(mode=0o700, parents=True)
        (self.directory / SAVED).mkdir()
        config.vmm_log.touch()
        for name, path in named_files(config).items():
            (self.directory / name).touch()
            _let_read(path)
        (self.directory / _LOG).touch()
        user = self._user(config)
        for path in (config.scratch, config.vmm_log):
            os.chown(path, user, user)
        yield []

    def prepare(self, config: VmConfig) -> Callable[[], None]:
        """Give the calling thread mounts of its own, with those of the jail."""
        user = self._user(config)
        files = {**named_files(config), _LOG: config.vmm_log}

        def mount_all() -> None:
            _check(_libc.unshare(_CLONE_NEWNS))
            _mount(b"none", Path("/"), _MS_REC | _MS_SLAVE)
            for name, path in files.items():
                if path.exists():
                    _mount(os.fsencode(path), self.directory / name, _MS_BIND)
            options = f"mode=0700,uid={user},gid={user}"
            saved = self.directory / SAVED
            _mount(b"saved", saved, _MS_NOSUID_NODEV_NOEXEC, kind=b"tmpfs", options=options)

        def told() -> None:
            try:
                mount_all()
            except OSError as error:
                raise VmmFailed("cannot make the jail's mounts", reason=str(error)) from None

        return told

    def put_state(self, vmstate: Path) -> None:
        """See Jail."""
        target = self.directory / LOADED_STATE
        target.unlink(missing_ok=True)
        shutil.copyfile(vmstate, target)
        target.chmod(0o444)

    def command(self, config: VmConfig, program: str) -> list[str]:
        """The command line of the jailer."""
        user = str(self._user(config))
        command = [self.jailer, "--id", _ID, "--exec-file", program, "--uid", user, "--gid", user]
        command += ["--chroot-base-dir", str(self.base)]
        if config.namespace is not None:
            command += ["--netns", f"/run/netns/{config.namespace}"]
        return [*command, "--", "--api-sock", SOCKET, "--log-path", _LOG, *LEVEL]

    def open_saved(self, pid: int, name: str) -> int:
        """See Jail. A link is not followed: the process may be one that its guest took over."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"/proc/{pid}/root/{name}", flags)

    def drop_saved(self, pid: int, name: str) -> None:
        """See Jail."""
        with contextlib.suppress(OSError):
            os.unlink(f"/proc/{pid}/root/{name}")

    @staticmethod
    def _user(config: VmConfig) -> int:
        # no two directories that are there have the same inode
        return _FIRST_USER + config.directory.stat().st_ino % _USERS


def _let_read(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # Firecracker will say so
        mode = path.stat().st_mode
        if not mode & stat.S_IROTH:
            path.chmod(mode | stat.S_IROTH)


def _mount(
    source: bytes, target: Path, flags: int, *, kind: bytes | None = None, options: str = ""
) -> None:
    data = options.encode() or None
    _check(_libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data), target)


def _check(result: int, path: Path | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path or "") or None)
