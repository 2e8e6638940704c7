"""File maps: for each non-zero window of a file, which chunk it is and where that lies.

docs/format.md, "File map", is the format. A map is complete: what it does not name is zeros.
"""

from __future__ import annotations

import array
import bisect
import itertools
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from torpor.errors import Damaged
from torpor.snapshot.repository.chunks import ID_BYTES, LONGEST_BYTES
from torpor.snapshot.windows import count_windows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACK_ID_BYTES: Final = 16
LARGEST_FILE_BYTES: Final = 1 << 44
LARGEST_PACK_BYTES: Final = 64 * 1024 * 1024
LARGEST_WAKE_BYTES: Final = 1 << 31


class Location(NamedTuple):
    """Where a sealed chunk lies: the 16-byte pack id, offset and length in the object."""

    pack: bytes
    offset: int
    length: int


class Entry(NamedTuple):
    """One window: its number, its chunk's id and location."""

    window: int
    chunk_id: bytes
    location: Location


class EncodedRun(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Windows that follow each other, whose chunks follow each other in one pack.

    `lengths` are the sealed chunks' lengths, 16 bits each, little-endian; `ids` 32 bytes each.
    """

    first_window: int
    pack: int
    offset: int
    lengths: bytes
    ids: bytes


class EncodedMap(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A file map as it stands in a record: the file's length, the packs, and the runs."""

    size_bytes: int
    packs: tuple[bytes, ...]
    runs: tuple[EncodedRun, ...]


@dataclass
class _Columns:
    """The entries of a map, a column each field: 46 bytes a window, however short the runs are."""

    windows: array.array[int] = field(default_factory=lambda: array.array("I"))
    packs: array.array[int] = field(default_factory=lambda: array.array("I"))
    offsets: array.array[int] = field(default_factory=lambda: array.array("I"))
    lengths: array.array[int] = field(default_factory=lambda: array.array("H"))
    ids: bytearray = field(default_factory=bytearray)


class FileMap:
    """A checked file map. Immutable; any thread may read it."""

    def __init__(
        self, size_bytes: int, packs: tuple[bytes, ...], columns: _Columns, ends: dict[bytes, int]
    ) -> None:
        self.size_bytes = size_bytes
        self.windows = len(columns.windows)
        """Windows that are not zero."""
        self._packs = packs
        self._columns = columns
        self._ends = ends

    def __iter__(self) -> Iterator[Entry]:
        """All entries, by window."""
        return map(self._entry, range(self.windows))

    def get(self, window: int) -> Entry | None:
        """The entry of a window, None for one of zeros."""
        windows = self._columns.windows
        place = bisect.bisect_left(windows, window)
        if place == len(windows) or windows[place] != window:
            return None
        return self._entry(place)

    def ids_between(self, first: int, last: int) -> list[bytes | None]:
        """The chunk ids of the windows from `first` to `last`, None for those that are zero."""
        windows = self._columns.windows
        begin = bisect.bisect_left(windows, first)
        end = bisect.bisect_right(windows, last, begin)
        packed = bytes(self._columns.ids[begin * ID_BYTES : end * ID_BYTES])
        ids: list[bytes | None] = [
            packed[at : at + ID_BYTES] for at in range(0, len(packed), ID_BYTES)
        ]
        if len(ids) == last - first + 1:
            return ids
        known = dict(zip(windows[begin:end], ids, strict=True))
        return [known.get(window) for window in range(first, last + 1)]

    def packed_ids(self) -> bytes:
        """The chunk ids of all entries, one after the other."""
        return bytes(self._columns.ids)

    @property
    def stored_bytes(self) -> int:
        """Sum of the sealed lengths, a chunk that several windows share counted for each."""
        return sum(self._columns.lengths)

    def packs(self) -> set[bytes]:
        """The ids of all packs that hold something of the file."""
        return set(self._ends)

    def pack_ends(self) -> dict[bytes, int]:
        """How long each of those packs must be at least for the file's chunks to be in it."""
        return dict(self._ends)

    def _entry(self, place: int) -> Entry:
        columns = self._columns
        pack = self._packs[columns.packs[place]]
        chunk_id = bytes(columns.ids[place * ID_BYTES : (place + 1) * ID_BYTES])
        where = Location(pack, columns.offsets[place], columns.lengths[place])
        return Entry(columns.windows[place], chunk_id, where)


def encode_map(size_bytes: int, entries: Iterable[Entry]) -> EncodedMap:
    """The encoded form of entries that ascend by window."""
    packs: dict[bytes, int] = {}
    runs: list[EncodedRun] = []
    pending: list[Entry] = []

    def close() -> None:
        if pending:
            lengths = array.array("H", (entry.location.length for entry in pending))
            if sys.byteorder == "big":
                lengths.byteswap()
            first = pending[0]
            pack = packs.setdefault(first.location.pack, len(packs))
            ids = b"".join(entry.chunk_id for entry in pending)
            place = first.location.offset
            runs.append(EncodedRun(first.window, pack, place, lengths.tobytes(), ids))
            pending.clear()

    for entry in entries:
        if pending and not _follows(pending[-1], entry):
            close()
        pending.append(entry)
    close()
    return EncodedMap(size_bytes, tuple(packs), tuple(runs))


def decode_map(
    encoded: EncodedMap, *, largest_pack_bytes: int = LARGEST_PACK_BYTES, origin: int = 0
) -> FileMap:
    """A map after every number in it was checked. Raises Damaged that says what does not fit.

    `origin` is added to every offset: where in its object the pack begins.
    """
    if not 0 <= encoded.size_bytes <= LARGEST_FILE_BYTES:
        raise _bad(f"a file of {encoded.size_bytes} bytes")
    if len(set(encoded.packs)) != len(encoded.packs) or any(
        len(pack) != PACK_ID_BYTES for pack in encoded.packs
    ):
        raise _bad("a pack id of another length, or one twice")
    columns = _Columns()
    ends: dict[bytes, int] = {}
    next_window, windows = 0, count_windows(encoded.size_bytes)
    for run in encoded.runs:
        lengths = _check_run(run, len(encoded.packs), largest_pack_bytes)
        if run.first_window < next_window:
            raise _bad("windows that do not ascend")
        next_window = run.first_window + len(lengths)
        if next_window > windows:
            raise _bad("a window behind the file's end")
        begin = origin + run.offset
        columns.windows.extend(range(run.first_window, next_window))
        columns.packs.extend(itertools.repeat(run.pack, len(lengths)))
        columns.offsets.extend(itertools.accumulate(lengths[:-1], initial=begin))
        columns.lengths.extend(lengths)
        columns.ids += run.ids
        pack = encoded.packs[run.pack]
        ends[pack] = max(ends.get(pack, 0), begin + sum(lengths))
    return FileMap(encoded.size_bytes, encoded.packs, columns, ends)


def _check_run(run: EncodedRun, packs: int, largest_pack_bytes: int) -> array.array[int]:
    """The lengths of a run's chunks, after all of its numbers but the window's were checked."""
    count, odd = divmod(len(run.lengths), 2)
    if odd or count == 0 or len(run.ids) != count * ID_BYTES:
        raise _bad("a run whose ids and lengths do not fit")
    if not 0 <= run.pack < packs:
        raise _bad("a run in a pack that is not listed")
    lengths = array.array("H", run.lengths)
    if sys.byteorder == "big":
        lengths.byteswap()
    if min(lengths) == 0 or max(lengths) > LONGEST_BYTES:
        raise _bad("a chunk length that cannot be")
    if run.offset < 0 or run.offset + sum(lengths) > largest_pack_bytes:
        raise _bad("a chunk behind its pack's end")
    return lengths


def _follows(left: Entry, right: Entry) -> bool:
    return (
        right.window == left.window + 1
        and right.location.pack == left.location.pack
        and right.location.offset == left.location.offset + left.location.length
    )


def _bad(reason: str) -> Damaged:
    return Damaged("a file map is inconsistent", reason=reason)
