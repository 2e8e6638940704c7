"""Wake objects: device state, scratch windows and working set in one object (docs/format.md)."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from torpor.snapshot.repository.filemap import Entry, Location, encode_map
from torpor.snapshot.repository.records import WakeLink, WakeRecord, hash_bytes, seal
from torpor.snapshot.repository.repository import SELF_PACK
from torpor.snapshot.repository.working_set import seal_segments
from torpor.snapshot.windows import WINDOW_BYTES, window_length

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import EncodedMap
    from torpor.snapshot.repository.records import SegmentRecord

LARGEST_DISK_BYTES: Final = 8 * 1024 * 1024
"""Scratch windows are repeated in a wake object only up to so many sealed bytes."""

Sealed = tuple[Entry, bytes]


class WakeObject:
    """A wake object that is being put together in memory: files first, then the working set."""

    def __init__(self, domain: Domain, key: str) -> None:
        self.key = key
        self._domain = domain
        self._data = bytearray()
        self._files: dict[str, EncodedMap] = {}
        self._segments: list[SegmentRecord] = []

    def add_file(self, name: str, size_bytes: int, chunks: Sequence[Sealed]) -> None:
        """Repeat a file's sealed chunks."""
        entries = []
        for entry, sealed in chunks:
            place = Location(SELF_PACK, len(self._data), len(sealed))
            entries.append(Entry(entry.window, entry.chunk_id, place))
            self._data += sealed
        self._files[name] = encode_map(size_bytes, entries)

    def add_disk(self, size_bytes: int, chunks: Sequence[Sealed]) -> None:
        """Repeat the scratch disk, unless it is so large that it is better fetched from packs."""
        if sum(len(sealed) for _, sealed in chunks) <= LARGEST_DISK_BYTES:
            self.add_file("disk", size_bytes, chunks)

    def add_working_set(
        self, snapshot: LocalSnapshot, images: Mapping[str, Path], *, level: int
    ) -> None:
        """Copy the windows that a trial found touched; nothing without a trial.

        `images` has the paths of `image` and `app`.
        """
        paths = {"memory": snapshot.memory, **images}
        with contextlib.ExitStack() as stack:
            opened = {}
            for name, path in paths.items():
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                opened[name] = (descriptor, os.fstat(descriptor).st_size)

            def read(name: str, window: int) -> bytes:
                descriptor, size = opened[name]
                length = window_length(window, size)
                return os.pread(descriptor, length, window * WINDOW_BYTES)

            # disks first: they are few windows, which a VMM reads before it maps any memory
            touched = sorted(
                (part for part in snapshot.working_set() if part.file in opened),
                key=lambda part: part.file == "memory",
            )
            segments = seal_segments(
                self._domain, self.key, touched, read=read, origin=len(self._data), level=level
            )
            for record, sealed in segments:
                self._segments.append(record)
                self._data += sealed

    def finish(self) -> tuple[WakeLink, bytes]:
        """The link that vouches for the object, and its bytes."""
        record = WakeRecord(files=self._files, working_set=tuple(self._segments))
        header = seal(self._domain, self.key, record)
        link = WakeLink(
            key=self.key,
            size_bytes=len(header) + len(self._data),
            header_bytes=len(header),
            hash=hash_bytes(header),
        )
        return link, header + self._data
