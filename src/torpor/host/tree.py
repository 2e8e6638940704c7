"""Delete a directory tree and nothing else: no mount is crossed, no link followed.

openat2(2) with RESOLVE_NO_XDEV refuses every mount, a bind mount of the same file system too, which
comparing device numbers would not see.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYS_OPENAT2: Final = 437
_RESOLVE: Final = 0x01 | 0x04 | 0x08  # NO_XDEV, NO_SYMLINKS, BENEATH
_DETACH: Final = 2 | 8  # MNT_DETACH, UMOUNT_NOFOLLOW
_DYING_S: Final = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def remove_tree(path: Path) -> None:
    """Delete the directory `path` with all in it; does nothing if it is not there.

    What is mounted inside is detached first, untouched. Processes in it that were just killed may
    still add files: it tries until they are gone. Blocking. Raises HostUnfit when `path` itself is
    a mount or another one cannot be detached, OSError.
    """
    place = path.parent.resolve() / path.name
    deadline = time.monotonic() + _DYING_S
    while True:
        for point in reversed(mounts_below(place)):
            _detach(point)
        try:
            with _opened(place.parent, os.O_PATH) as parent:
                _remove_directory(parent, place.name, place)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or time.monotonic() > deadline:
                raise


def mounts_below(path: Path) -> list[Path]:
    """The mount points below the resolved `path` that this process sees, in order of mounting."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    points = [Path(_unescaped(os.fsdecode(line.split()[4]))) for line in lines]
    return [point for point in points if point != path and point.is_relative_to(path)]


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _detach(point: Path) -> None:
    if _libc.umount2(os.fsencode(point), _DETACH) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise HostUnfit(f"cannot unmount {point}", reason=reason, hint=f"umount {point}")


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_inside(directory: int, name: str, place: Path) -> int:
    """A directory as a descriptor, if it is one and of the same mount as its parent."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    how = _OpenHow(flags, 0, _RESOLVE)
    arguments = (directory, os.fsencode(name), ctypes.byref(how), ctypes.sizeof(how))
    descriptor = int(_libc.syscall(_SYS_OPENAT2, *arguments))
    if descriptor >= 0:
        return descriptor
    number = ctypes.get_errno()
    if number == errno.EXDEV:
        raise HostUnfit(
            f"cannot delete {place}", reason="something is mounted there", hint=f"umount {place}"
        )
    raise OSError(number, os.strerror(number), str(place))


def _remove_directory(parent: int, name: str, place: Path) -> None:
    try:
        directory = _open_inside(parent, name, place)
    except FileNotFoundError:
        return
    try:
        for entry in os.listdir(directory):
            _remove_entry(directory, entry, place / entry)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=parent)


def _remove_entry(directory: int, name: str, place: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            _remove_directory(directory, name, place)
        else:
            os.unlink(name, dir_fd=directory)
