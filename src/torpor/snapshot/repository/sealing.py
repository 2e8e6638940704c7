"""Reading windows of a file and making sealed chunks of them, by several threads, in order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from torpor.host.threads import map_ordered
from torpor.snapshot.repository.chunks import encode_all
from torpor.snapshot.repository.filemap import Entry, FileMap, Location
from torpor.snapshot.windows import WINDOW_BYTES, count_windows, is_zero

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torpor.snapshot.repository.domain import Domain

_BATCH_WINDOWS: Final = 64
_NOWHERE: Final = Location(b"", 0, 0)


@dataclass(frozen=True)
class Source:
    """What is known of a file's windows without reading them.

    A window that is not in `written` has its parent's entry.
    """

    parent: FileMap | None = None
    written: frozenset[int] = frozenset()

    def unread(self, window: int) -> Entry | None:
        """The parent's entry of a window that was not written since, if there is one."""
        if self.parent is None or window in self.written:
            return None
        return self.parent.get(window)


class Item(NamedTuple):
    """A window that is not zero: its entry if its chunk is known, else its chunk to be sent."""

    window: int
    chunk_id: bytes
    sealed: bytes
    entry: Entry | None


@dataclass
class Batch:
    """The items of some windows in order, and how many bytes were read for them, or not."""

    windows: int
    items: list[Item] = field(default_factory=list)
    read_bytes: int = 0
    unread_bytes: int = 0


class Sealer:
    """Makes chunks of files' windows for one domain. Any thread; each call has its own threads."""

    def __init__(self, domain: Domain, *, level: int, workers: int) -> None:
        self._domain = domain
        self._level = level
        self._workers = workers

    def seal(
        self,
        path: Path,
        windows: Sequence[int],
        known: Mapping[bytes, Location],
        source: Source,
        *,
        always: bool = False,
    ) -> Iterator[Batch]:
        """Batches for `windows` of a file, in their order, without those that hold only zeros.

        A chunk that is in `known` is not sealed unless `always`. Raises what reading raises.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

        def work(batch: Sequence[int]) -> Batch:
            return self._seal(descriptor, batch, known, source, always)

        batches = (
            windows[begin : begin + _BATCH_WINDOWS]
            for begin in range(0, len(windows), _BATCH_WINDOWS)
        )
        try:
            yield from map_ordered(work, batches, workers=self._workers, ahead=2 * self._workers)
        finally:
            os.close(descriptor)

    def seal_all(self, path: Path, size_bytes: int) -> list[tuple[Entry, bytes]]:
        """Every window of a small file that is not zero, sealed; the entries lie nowhere yet."""
        windows = range(count_windows(size_bytes))
        return [
            (Entry(item.window, item.chunk_id, _NOWHERE), item.sealed)
            for batch in self.seal(path, windows, {}, Source())
            for item in batch.items
        ]

    def _seal(
        self,
        descriptor: int,
        batch: Sequence[int],
        known: Mapping[bytes, Location],
        source: Source,
        always: bool,
    ) -> Batch:
        made = Batch(len(batch))
        entries: dict[int, Entry] = {}
        for window in batch:
            entry = source.unread(window)
            if entry is not None:
                entries[window] = entry
        made.unread_bytes = len(entries) * WINDOW_BYTES
        ids: dict[int, bytes] = {}
        new: dict[int, bytes] = {}
        for window, data in _read_windows(descriptor, [w for w in batch if w not in entries]):
            made.read_bytes += len(data)
            if is_zero(data):
                continue
            chunk_id = ids[window] = self._domain.chunk_id(data)
            place = known.get(chunk_id)
            if place is not None:
                entries[window] = Entry(window, chunk_id, place)
            if place is None or always:
                new[window] = data
        encoded = dict(zip(new, encode_all([*new.values()], level=self._level), strict=True))
        for window in batch:
            entry = entries.get(window)
            if entry is None and window not in ids:
                continue
            chunk_id = entry.chunk_id if entry else ids[window]
            sealed = b""
            if window in encoded:
                sealed = self._domain.seal_chunk(chunk_id, encoded[window])
            made.items.append(Item(window, chunk_id, sealed, entry))
        return made


def _read_windows(descriptor: int, windows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Each window with its content; those that follow each other are read at once."""
    begin = 0
    for end in range(1, len(windows) + 1):
        first = windows[begin]
        if end < len(windows) and windows[end] - first == end - begin:
            continue
        data = os.pread(descriptor, (end - begin) * WINDOW_BYTES, first * WINDOW_BYTES)
        for offset in range(0, len(data), WINDOW_BYTES):
            yield first + offset // WINDOW_BYTES, data[offset : offset + WINDOW_BYTES]
        begin = end
