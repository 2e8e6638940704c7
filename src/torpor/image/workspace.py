"""Directories in which images are made: one a build, gone with it or with the next opening.

A maker holds flock(2) on its directory, so a directory that nobody holds is a dead maker's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.host.tree import remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX: Final = ".building-"


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[Path]:
    """An empty directory below `root`, deleted at the end with whatever is in it."""
    path, lock = _make(root)
    try:
        # programs of other users (apt's downloader) must be able to enter
        path.chmod(0o755)
        yield path
    finally:
        try:
            remove_tree(path)
        finally:
            os.close(lock)


def sweep_workspaces(root: Path) -> None:
    """Delete what makers that died left below `root`. Blocking; raises as `remove_tree` does."""
    for path in root.glob(f"{_PREFIX}*"):
        lock = _claim(path)
        if lock is not None:
            try:
                remove_tree(path)
            finally:
                os.close(lock)


def _make(root: Path) -> tuple[Path, int]:
    """A sweep may take a directory between its making and our claim: then another one."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = _claim(path)
        if lock is not None:
            return path, lock


def _claim(path: Path) -> int | None:
    """The directory's lock as a descriptor; None while its maker lives, or when it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink > 0:
            return descriptor
    os.close(descriptor)
    return None
