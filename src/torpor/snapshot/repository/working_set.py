"""Working sets: the windows that a woken function touches, sealed in segments for its wake object.

A segment holds up to SEGMENT_WINDOWS windows and is compressed and sealed as one, so that opening
it costs one call outside the interpreter's lock, not one a window. The windows are in packs too,
each by itself: a working set is a copy in the order of its use.
"""

from __future__ import annotations

import array
import itertools
import os
import sys
from typing import TYPE_CHECKING, Final

from torpor.errors import Damaged
from torpor.host.threads import map_ordered
from torpor.snapshot.repository.chunks import decode, encode, encode_dense
from torpor.snapshot.repository.records import SegmentRecord, damaged, hash_bytes
from torpor.snapshot.windows import WINDOW_BYTES, Touched, count_windows, window_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.stored import StoredSnapshot, WakeHeader

SEGMENT_WINDOWS: Final = 128
FILES: Final = ("memory", "image", "app")
_GROUPS_WINDOWS: Final = (64, 128, 128, 2048)
_DENSE_LEVEL: Final = 3
_HEADER: Final = b"TORPOR-SEGMENT-1"


def seal_segments(
    domain: Domain,
    key: str,
    touched: Sequence[Touched],
    *,
    read: Callable[[str, int], bytes],
    origin: int,
    level: int,
) -> Iterator[tuple[SegmentRecord, bytes]]:
    """The segments of a working set and their sealed bytes, for the wake object `key`.

    `read` gives the content of a file's window, in any thread. `origin` is the offset of the first
    segment. They are compressed at `level` when that is below 3, which is quick, else as densely as
    pays: they are sealed once and fetched at every wake.
    """

    def work(part: tuple[str, Sequence[int]]) -> bytes:
        file, windows = part
        content = b"".join(read(file, window) for window in windows)
        dense = level >= _DENSE_LEVEL
        encoded = encode_dense(content) if dense else encode(content, level=level)
        return domain.seal_record(_HEADER, key, encoded)

    parts = [(part.file, windows) for part in touched for windows in _cut(part.windows)]
    offset = origin
    workers = os.cpu_count() or 1
    every = map_ordered(work, parts, workers=workers, ahead=2 * workers)
    for (file, windows), sealed in zip(parts, every, strict=True):
        record = SegmentRecord(
            file=file,
            windows=_encode_windows(windows),
            offset=offset,
            length=len(sealed),
            hash=hash_bytes(sealed),
        )
        offset += len(sealed)
        yield record, sealed


def segment_windows(record: SegmentRecord, *, data_bytes: int) -> list[int]:
    """The windows of a segment in a wake object with `data_bytes` behind its header.

    Raises Damaged when a number in the record cannot be.
    """
    if record.file not in FILES:
        raise Damaged(f"a segment of the file {record.file[:20]!r}")
    if record.offset < 0 or record.length <= 0 or record.offset + record.length > data_bytes:
        raise Damaged("a segment behind the object's end")
    count, odd = divmod(len(record.windows), 4)
    if odd or not 0 < count <= SEGMENT_WINDOWS:
        raise Damaged(f"a segment of {len(record.windows) / 4} windows")
    numbers = array.array("I", record.windows)
    if sys.byteorder == "big":
        numbers.byteswap()
    return list(numbers)


def touched_windows(wake: WakeHeader, stored: StoredSnapshot) -> tuple[Touched, ...]:
    """The working set as trials found it, but for the order inside a group, see `seal_segments`.

    Raises Damaged when it has a window that its file has not.
    """
    sizes = stored.sizes()
    data_bytes = wake.link.size_bytes - wake.link.header_bytes
    found: dict[str, list[int]] = {}
    for segment in wake.working_set:
        windows = segment_windows(segment, data_bytes=data_bytes)
        if max(windows) >= count_windows(sizes.get(segment.file, 0)):
            raise damaged(wake.link.key, "a segment with a window behind its file's end")
        found.setdefault(segment.file, []).extend(windows)
    return tuple(Touched(file, tuple(windows)) for file, windows in found.items())


def open_segment(
    domain: Domain,
    key: str,
    record: SegmentRecord,
    sealed: bytes | memoryview,
    *,
    size_bytes: int,
) -> bytes:
    """The windows' content, one after the other; `size_bytes` is their file's length.

    Raises Damaged when it is not what the record vouches for, or of another length.
    """
    if hash_bytes(sealed) != record.hash:
        raise Damaged("a segment's hash is another than its record says")
    windows = segment_windows(record, data_bytes=record.offset + record.length)
    if max(windows) >= count_windows(size_bytes):
        raise Damaged("a segment with a window behind its file's end")
    expected = sum(window_length(window, size_bytes) for window in windows)
    body = domain.open_record(_HEADER, key, sealed)
    content = decode(body, limit_bytes=SEGMENT_WINDOWS * WINDOW_BYTES)
    if len(content) != expected:
        raise Damaged(f"a segment of {len(content)} bytes, not {expected}")
    return content


def _cut(windows: Sequence[int]) -> Iterator[Sequence[int]]:
    for group in _neighbours_together(windows):
        for begin in range(0, len(group), SEGMENT_WINDOWS):
            yield group[begin : begin + SEGMENT_WINDOWS]


def _neighbours_together(windows: Sequence[int]) -> Iterator[list[int]]:
    """First-touch order in the large, address order within: that compresses better, and what lies
    side by side is pushed with one call. The first groups are small: a VMM that loads device state
    and a guest that begins to run wait for those."""
    sizes = itertools.chain(_GROUPS_WINDOWS, itertools.repeat(_GROUPS_WINDOWS[-1]))
    begin = 0
    while begin < len(windows):
        end = begin + next(sizes)
        yield sorted(windows[begin:end])
        begin = end


def _encode_windows(windows: Sequence[int]) -> bytes:
    numbers = array.array("I", windows)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
