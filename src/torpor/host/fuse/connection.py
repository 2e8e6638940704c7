"""/dev/fuse: mount, negotiate, clone, send again, unmount (fuse(4), mount(2), linux/fuse.h).

A connection lives as long as one process holds each of its descriptors. A cloned descriptor has its
own list of requests taken and not answered; when its last holder closes it, the kernel ends those
with ECONNABORTED. So who keeps the mount must hold all of them, and must not serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec

from torpor.errors import HostUnfit, InvalidInput
from torpor.host.fuse import answers, protocol
from torpor.host.fuse.layouts import DEVICE_CLONE, InitFlag
from torpor.structs import prepared
from torpor.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.host.process import ProcessId

DEVICE: Final = Path("/dev/fuse")
TYPE: Final = "fuse.torpor"
MAX_BACKGROUND: Final = 128  # reads that the kernel has under way before it lets readers wait

_DEVICE_NUMBER: Final = os.makedev(10, 229)
_MS_NOSUID_NODEV_NOEXEC_NOATIME: Final = 0x2 | 0x4 | 0x8 | 0x400
_MNT_FORCE_DETACH: Final = 1 | 2
_LOOK_AGAIN_S: Final = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


class _Passed(msgspec.Struct):
    """What a connection is beside its descriptors, as text for another process."""

    mount_point: str
    descriptors: list[int]
    minor: int
    flags: int
    max_readahead: int


@dataclass(frozen=True)
class Connection:
    """A mounted file system: its descriptors, where it is, what was agreed on.

    Any process that got the descriptors (fork, `pass_fds`, SCM_RIGHTS) may use it.
    """

    descriptors: tuple[int, ...]
    mount_point: Path
    negotiated: protocol.Negotiated

    @classmethod
    def mount(cls, mount_point: Path, *, descriptors: int = 4, read_ahead_bytes: int = MiB) -> Self:
        """Mount at an existing directory and answer INIT; no file can be read before a server runs.

        The mount is not read-only, for QEMU opens memory files for writing. Writes are refused, but
        the kernel lets a shared writable mapping change the page cache until it is invalidated, so
        nobody may map a file MAP_SHARED for writing. Raises HostUnfit, OSError; leaves nothing on
        failure.
        """
        first = _open_device()
        opened = [first]
        try:
            _mount(mount_point, first)
            try:
                negotiated = _initialize(first, read_ahead_bytes)
                opened += (_clone(first) for _ in range(descriptors - 1))
                _set_read_ahead(mount_point, read_ahead_bytes)
            except BaseException:
                unmount(mount_point)
                raise
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            raise
        return cls(tuple(opened), mount_point, negotiated)

    @classmethod
    def adopt(cls, text: str, *, descriptors: Sequence[int] | None = None) -> Self:
        """The connection that another process described, from descriptors that this one was given.

        `descriptors` are their numbers here, if not the same. Raises InvalidInput.
        """
        try:
            passed = msgspec.json.decode(text, type=prepared(_Passed))
        except msgspec.MsgspecError as error:
            raise InvalidInput("not a FUSE connection", reason=str(error)) from None
        numbers = tuple(passed.descriptors if descriptors is None else descriptors)
        for number in numbers:
            _check_device(number)
        agreed = protocol.Negotiated(passed.minor, InitFlag(passed.flags), passed.max_readahead)
        return cls(numbers, Path(passed.mount_point), agreed)

    def describe(self) -> str:
        """The connection as a line of text for `adopt`."""
        passed = _Passed(
            str(self.mount_point),
            list(self.descriptors),
            self.negotiated.minor,
            int(self.negotiated.flags),
            self.negotiated.max_readahead,
        )
        return msgspec.json.encode(passed).decode()

    def resend(self) -> None:
        """Have the kernel put all requests that were taken and not answered back into its queue.

        Right at any time: a request that is served twice is answered once. Never blocks. Raises
        HostUnfit when the kernel cannot; after the end of the mount nothing happens, or
        OSError(EINVAL) on newer kernels.
        """
        self.require_resend()
        os.writev(self.descriptors[0], answers.encode_resend())

    def require_resend(self) -> None:
        """Raise HostUnfit when the kernel cannot send requests again (before Linux 6.9)."""
        if not self.negotiated.has_resend:
            raise HostUnfit(
                "this kernel cannot send FUSE requests again",
                reason="FUSE_HAS_RESEND is not offered",
                hint="use Linux 6.9 or later; until then, unmount when a server died",
            )

    def close(self) -> None:
        """Close this process's descriptors; the last holder's close ends the mount's life."""
        for descriptor in self.descriptors:
            os.close(descriptor)

    def unmount(self) -> None:
        """Unmount, then close. Waiting readers get ECONNABORTED, mappings SIGBUS."""
        unmount(self.mount_point)
        self.close()


def unmount(mount_point: Path) -> None:
    """End a mount at once, whoever waits for it (umount2 with MNT_FORCE and MNT_DETACH).

    Does not ask the server. Nothing happens where nothing of that kind is mounted.
    """
    while find_device(mount_point) is not None:
        _check(_libc.umount2(os.fsencode(mount_point), _MNT_FORCE_DETACH))


def probe() -> protocol.Negotiated:
    """What this kernel agrees to, found out by a mount that is gone on return.

    Raises HostUnfit, OSError.
    """
    with tempfile.TemporaryDirectory(prefix="torpor-fuse-") as name:
        connection = Connection.mount(Path(name), descriptors=1)
        connection.unmount()
    return connection.negotiated


def find_device(mount_point: Path) -> str | None:
    """`major:minor` of the pager's mount at a path, without asking its server; else None."""
    wanted = str(mount_point)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == TYPE and _unescaped(fields[4]) == wanted:
            return fields[2]
    return None


def wait_dying(process: ProcessId, *, timeout_s: float) -> bool:
    """Wait until a server has ended or only its end is left; False when time is up.

    A process that was killed does not end while one of its threads waits in the kernel for a page
    that only a server can give (`Server.store`), and no pidfd becomes readable. Its main thread is
    gone then, which /proc shows. Who waits for the end before starting a successor waits for ever.
    """
    deadline = time.monotonic() + timeout_s
    while process.is_alive():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        if process.wait(timeout_s=min(left_s, _LOOK_AGAIN_S)):
            return True
    return True


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostUnfit(
            f"{DEVICE} cannot be opened", reason=str(error.strerror), hint="modprobe fuse, as root"
        ) from None


def _mount(mount_point: Path, descriptor: int) -> None:
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    flags = ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC_NOATIME)
    target = os.fsencode(mount_point)
    try:
        _check(_libc.mount(b"torpor", target, TYPE.encode(), flags, options.encode()))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENODEV):
            raise
        raise HostUnfit(
            f"cannot mount at {mount_point}",
            reason=str(error.strerror),
            hint="run as root on a kernel with FUSE",
        ) from None


def _initialize(descriptor: int, read_ahead_bytes: int) -> protocol.Negotiated:
    message = os.read(descriptor, protocol.REQUEST_BYTES)
    header = protocol.decode_header(message)
    body = protocol.decode_body(header, message)
    if not isinstance(body, protocol.Init):
        raise HostUnfit("the kernel's first FUSE request is not INIT", reason=str(header))
    agreed, arguments = protocol.negotiate(
        body, max_readahead=read_ahead_bytes, max_background=MAX_BACKGROUND
    )
    os.writev(descriptor, answers.encode_answer(header.unique, [arguments]))
    return agreed


def _clone(descriptor: int) -> int:
    clone = _open_device()
    try:
        fcntl.ioctl(clone, DEVICE_CLONE, struct.pack("=I", descriptor))
    except BaseException:
        os.close(clone)
        raise
    return clone


def _set_read_ahead(mount_point: Path, read_ahead_bytes: int) -> None:
    """INIT can only lessen the kernel's 128 KiB; more goes through sysfs, where it is writable."""
    knob = Path(f"/sys/class/bdi/{find_device(mount_point)}/read_ahead_kb")
    with contextlib.suppress(FileNotFoundError, PermissionError):
        knob.write_text(str(read_ahead_bytes // KiB))


def _check_device(descriptor: int) -> None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        raise InvalidInput(f"descriptor {descriptor} is not open") from None
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _DEVICE_NUMBER:
        raise InvalidInput(f"descriptor {descriptor} is not {DEVICE}")


def _unescaped(text: str) -> str:
    """A path as mountinfo writes it, with its octal escapes undone."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
