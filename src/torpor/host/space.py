"""A full disk, which the kernel tells in its way and torpor in one: NoSpace."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from torpor.errors import NoSpace

if TYPE_CHECKING:
    from pathlib import Path

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def no_space_of(error: BaseException, path: Path | None = None) -> BaseException:
    """NoSpace in place of an error that says that a disk is full; every other error as it is.

    `path`: what could not be written, where the error does not say so itself.
    """
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return error
    what = path or error.filename
    message = f"the disk is full, {what or 'a file'} could not be written"
    return NoSpace(message, reason="" if what is None else os.strerror(error.errno))


def is_full(path: Path, *, below_bytes: int = 1) -> bool:
    """Whether the disk of a path has no more room than that, or no file more.

    A path that is not there is on no full disk.
    """
    try:
        status = os.statvfs(path)
    except OSError:
        return False
    room_bytes = status.f_bavail * status.f_frsize
    return room_bytes < below_bytes or (status.f_files > 0 and status.f_favail == 0)
