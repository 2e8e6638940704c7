"""Trials: which windows a restored function touches, and in which order.

A trial's files are served by the process that makes the trial, from the node's own files, through a
mount that lives as long as the trial. A guest that starts with nothing in the page cache asks for
each window when it first touches it; with huge pages out of the way (see `host.seccomp`) what it
asks for is what it touches, in that order.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.host.fuse.connection import Connection, unmount
from torpor.host.fuse.server import Server
from torpor.pager.served import LocalFile, ServedFiles
from torpor.snapshot.windows import WINDOW_BYTES, Touched

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_WORKERS: Final = 2
_COMMON_FOR_ONE: Final = 16


@dataclass(frozen=True)
class Trial:
    """A mount with a copy of each file by name, and what was touched of them so far."""

    paths: dict[str, Path]
    _files: dict[str, LocalFile]

    def touched(self) -> tuple[Touched, ...]:
        """For each file the windows in the order of their first read."""
        return tuple(Touched(name, file.touched()) for name, file in self._files.items())


@contextlib.contextmanager
def serve_trial(mount_point: Path, files: Mapping[str, Path]) -> Iterator[Trial]:
    """Serve files by name below a directory that is made for it and gone after the body.

    Blocking. No VM may map the files any more when the body ends. Raises HostUnfit.
    """
    mount_point = mount_point.resolve()  # as the kernel lists mounts
    served = ServedFiles()
    opened: dict[str, LocalFile] = {}
    try:
        for name, path in files.items():
            opened[name] = LocalFile(path, path.stat().st_size)
            served.serve((name,), opened[name])
        mount_point.mkdir(mode=0o700)
        try:
            connection = Connection.mount(
                mount_point, descriptors=_WORKERS, read_ahead_bytes=WINDOW_BYTES
            )
            server = Server(connection, served, workers=_WORKERS)
            server.start()
            try:
                yield Trial({name: mount_point / name for name in files}, opened)
            finally:
                unmount(mount_point)
                server.wait()  # before its descriptors may become other files
                connection.close()
        finally:
            mount_point.rmdir()
    finally:
        for file in opened.values():
            file.close()


def sweep(mount_point: Path) -> None:
    """Remove what a killed trial left mounted."""
    unmount(mount_point.resolve())
    with contextlib.suppress(OSError):
        mount_point.rmdir()


def merge(trials: Sequence[tuple[Touched, ...]]) -> tuple[Touched, ...]:
    """What all trials touched in the order of the first; behind it what only some of them did.

    That is for the next wake's chance, and bounded by one window for 16 that all touched: a guest
    that touches other windows each time cannot make others pay for them.
    """
    merged = []
    for part in trials[0]:
        every = [
            tuple(window for other in trial if other.file == part.file for window in other.windows)
            for trial in trials
        ]
        common = frozenset.intersection(*map(frozenset, every))
        rest = dict.fromkeys(w for windows in every for w in windows if w not in common)
        kept = [*rest][: len(common) // _COMMON_FOR_ONE]
        merged.append(Touched(part.file, (*(w for w in part.windows if w in common), *kept)))
    return tuple(merged)
