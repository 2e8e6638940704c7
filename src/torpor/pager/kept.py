"""Copies of working sets on this node, for the next wake: one file a wake object, bounded together.

A copy holds the segments at their offsets, as they are in the store: sealed, each with a hash in
the wake object's header. What was not fetched is a hole in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.snapshot.repository.records import hash_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torpor.snapshot.repository.records import SegmentRecord

log = logging.getLogger("torpor.pager")


@dataclass(frozen=True)
class KeptCopies:
    """The copies in one directory, which is there. Any thread; a disk that fails is one of none."""

    directory: Path
    limit_bytes: int

    def read(self, name: str, segments: Sequence[SegmentRecord]) -> bytes | None:
        """Segments that follow each other, None unless all of them are here and right."""
        first, last = segments[0], segments[-1]
        length = last.offset + last.length - first.offset
        try:
            with (self.directory / name).open("rb", buffering=0) as stream:
                data = os.pread(stream.fileno(), length, first.offset)
        except OSError:
            return None
        view = memoryview(data)
        for record in segments:
            begin = record.offset - first.offset
            if hash_bytes(view[begin : begin + record.length]) != record.hash:
                return None
        return data

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Keep bytes of a wake object's working set."""
        try:
            descriptor = os.open(
                self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            try:
                os.pwrite(descriptor, data, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.info("working set not kept name=%s error=%s", name, error)

    def used(self, name: str) -> None:
        """Note that a copy was used, then delete those used longest ago that are too much."""
        now_ns = time.time_ns()  # the kernel's own is too coarse to order by
        with contextlib.suppress(OSError):
            os.utime(self.directory / name, ns=(now_ns, now_ns))
        left = self.limit_bytes
        for _, size_bytes, path in sorted(self._list(), reverse=True):
            left -= size_bytes
            if left < 0:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _list(self) -> list[tuple[int, int, Path]]:
        found = []
        with contextlib.suppress(OSError):
            for path in self.directory.iterdir():
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_blocks * 512, path))
        return found
