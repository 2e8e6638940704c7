"""Reading windows of a file and making sealed chunks of them, by several threads, in order."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torpor.host.threads import map_ordered
from torpor.snapshot.repository.chunks import encode
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


@dataclass(frozen=True)
class Item:
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
            made = Batch(len(batch))
            for window in batch:
                entry = source.unread(window)
                if entry is not None:
                    made.unread_bytes += WINDOW_BYTES
                    made.items.append(Item(window, entry.chunk_id, b"", entry))
                    continue
                data = os.pread(descriptor, WINDOW_BYTES, window * WINDOW_BYTES)
                made.read_bytes += len(data)
                if not is_zero(data):
                    made.items.append(self._item(window, data, known, always))
            return made

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

    def _item(
        self, window: int, data: bytes, known: Mapping[bytes, Location], always: bool
    ) -> Item:
        chunk_id = self._domain.chunk_id(data)
        place = known.get(chunk_id)
        entry = None if place is None else Entry(window, chunk_id, place)
        sealed = b""
        if entry is None or always:
            sealed = self._domain.seal_chunk(chunk_id, encode(data, level=self._level))
        return Item(window, chunk_id, sealed, entry)
