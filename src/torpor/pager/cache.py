"""The node's chunk cache: windows by chunk id in slots of one file, bounded, verified when read.

    DIR/slots    slot n is the WINDOW_BYTES from n * WINDOW_BYTES on
    DIR/table    64 bytes a slot: chunk id (32), length (4), zero (4), age (8), check (8), zero (8),
                 little-endian; the check is the content's XXH3 of 64 bits, whose seed is the id's
                 first 8 bytes (xxhash.com, doc/xxhash_spec.md)

A chunk's content is compared with its id, a keyed hash of 32 bytes, before it comes here. Whenever
it is read it is compared with its check, so a crash, a flipped bit or a foreign file costs a fetch
and does not give wrong bytes: the seed makes that hold for an entry that was written in parts, too.
Who can write to the directory on purpose is root, and needs no cache for that. The table is read
once, at the beginning; memory knows what is where after that.
"""

from __future__ import annotations

import array
import collections
import contextlib
import fcntl
import logging
import os
import struct
import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_intdigest

from torpor.errors import Conflict
from torpor.snapshot.repository.chunks import ID_BYTES
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

_ENTRY: Final = struct.Struct("<32sIIQQ8x")
_EMPTY: Final = bytes(_ENTRY.size)
_CANDIDATES: Final = 64
_COUNTERS: Final = 1 << 21
_LAST_AGE: Final = 1 << 63

log = logging.getLogger("torpor.pager")


@dataclass(frozen=True)
class CacheCounters:
    """What a cache did since it was opened, and what it holds.

    `chunks` are here, `protected` is how many protections there are, a chunk that several files
    want counted for each.
    """

    hits: int
    misses: int
    damaged: int
    failures: int
    evicted: int
    chunks: int
    protected: int
    capacity_bytes: int


class ChunkCache:
    """Windows on disk by chunk id, at most `capacity_bytes`; any thread may call.

    What does not work on the disk (full, read-only, gone) makes it forget, never raise: a cache
    that fails is one that misses. Eviction takes what was used longest ago and is not protected.
    """

    def __init__(
        self, directory: Path, *, capacity_bytes: int, predecessor_died: bool = False
    ) -> None:
        """Open the cache in a directory, made if need be; one process at a time.

        A predecessor that was killed may hold its lock for a while still, but does nothing more
        than end the one write that it was at, which the check of every read covers. Raises Conflict
        while another process has it, OSError when it cannot be opened at all.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.capacity_bytes = capacity_bytes
        self._slots_total = max(1, capacity_bytes // WINDOW_BYTES)
        self._lock = threading.Lock()
        self._places: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._lengths = array.array("H", bytes(2 * self._slots_total))
        self._checks = array.array("Q", bytes(8 * self._slots_total))
        self._free: list[int] = []
        self._protections = _Protections()
        self._counts: collections.Counter[str] = collections.Counter()
        self._age = 0
        with contextlib.ExitStack() as stack:
            self._slots = _open(directory / "slots", stack)
            self._table = _open(directory / "table", stack)
            _lock(self._slots, directory, is_left=predecessor_died)
            os.truncate(self._table, self._slots_total * _ENTRY.size)
            os.truncate(self._slots, self._slots_total * WINDOW_BYTES)
            self._load()
            stack.pop_all()

    def get(
        self, chunk_ids: Collection[bytes], may_wait: Callable[[], None] = lambda: None
    ) -> dict[bytes, memoryview]:
        """Contents by id of those chunks, each given once, that are here and right.

        Slots that follow each other are read at once. `may_wait` is called before the disk is
        waited for: not for what the host's page cache has.
        """
        with self._lock:
            known = [(i, slot) for i in chunk_ids if (slot := self._places.get(i)) is not None]
            for chunk_id, _ in known:
                self._places.move_to_end(chunk_id)
            expected = [(self._lengths[slot], self._checks[slot]) for _, slot in known]
        data = self._read([slot for _, slot in known], may_wait)
        found: dict[bytes, memoryview] = {}
        begin = 0
        for (chunk_id, _), (length, check) in zip(known, expected, strict=True):
            content = data[begin : begin + length]
            if _check_of(chunk_id, content) == check:
                found[chunk_id] = content
            begin += WINDOW_BYTES
        with self._lock:
            self._counts["hits"] += len(found)
            self._counts["misses"] += len(chunk_ids) - len(found)
            if len(found) < len(known):
                for chunk_id, slot in known:  # if not evicted and written over meanwhile
                    if chunk_id not in found and self._places.get(chunk_id) == slot:
                        self._counts["damaged"] += 1
                        self._drop(chunk_id)
        return found

    def _read(self, slots: list[int], may_wait: Callable[[], None]) -> memoryview:
        """The bytes of slots, one after the other; zeros for those the disk does not give."""
        data = memoryview(bytearray(len(slots) * WINDOW_BYTES))
        for begin, end in _runs(slots):
            wanted = data[begin * WINDOW_BYTES : end * WINDOW_BYTES]
            self._read_run(slots[begin] * WINDOW_BYTES, wanted, may_wait)
        return data

    def _read_run(self, offset: int, wanted: memoryview, may_wait: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):  # it is not in memory, or no file system that can tell
            if os.preadv(self._slots, [wanted], offset, os.RWF_NOWAIT) == len(wanted):
                return
        may_wait()
        try:
            os.preadv(self._slots, [wanted], offset)
        except OSError as error:
            self._failed("read", error)

    def has(self, chunk_id: bytes) -> bool:
        """Whether a chunk seems to be here, without reading it."""
        return chunk_id in self._places

    def put(self, chunk_id: bytes, content: bytes | memoryview) -> None:
        """Keep a verified chunk of at most a window, if there is room that nothing protected has.

        Where nearly all is protected a chunk may be left out although an old one could go.
        """
        with self._lock:
            if chunk_id in self._places:
                return
            slot = self._take_slot()
        if slot is None:
            return
        try:
            _write(self._slots, content, slot * WINDOW_BYTES)
        except OSError as error:
            self._failed("write", error)
            with self._lock:
                self._free.append(slot)
            return
        with self._lock:
            if chunk_id in self._places:  # another thread was as quick
                self._free.append(slot)
                return
            self._age += 1
            check = _check_of(chunk_id, content)
            self._enter(slot, _ENTRY.pack(chunk_id, len(content), 0, self._age, check))
            self._lengths[slot], self._checks[slot] = len(content), check
            self._places[chunk_id] = slot

    def protect(self, chunk_ids: bytes) -> None:
        """Keep chunks from eviction, those that come later too, until as many `unprotect`.

        The ids stand one after the other.
        """
        with self._lock:
            self._protections.add(chunk_ids, 1)

    def unprotect(self, chunk_ids: bytes) -> None:
        """Take one protection from each of the chunks."""
        with self._lock:
            self._protections.add(chunk_ids, -1)

    def counters(self) -> CacheCounters:
        """What it did and holds."""
        with self._lock:
            return CacheCounters(
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                damaged=self._counts["damaged"],
                failures=self._counts["failures"],
                evicted=self._counts["evicted"],
                chunks=len(self._places),
                protected=self._protections.total,
                capacity_bytes=self.capacity_bytes,
            )

    def close(self) -> None:
        """Let another process have it."""
        os.close(self._table)
        os.close(self._slots)

    def _load(self) -> None:
        size = self._slots_total * _ENTRY.size
        table = os.pread(self._table, size, 0).ljust(size, b"\0")
        found: list[tuple[int, bytes, int]] = []
        for slot, (chunk_id, length, zero, age, check) in enumerate(_ENTRY.iter_unpack(table)):
            if 0 < length <= WINDOW_BYTES and zero == 0 and age < _LAST_AGE:
                found.append((age, chunk_id, slot))
                self._lengths[slot], self._checks[slot] = length, check
            else:
                self._free.append(slot)
        self._free.reverse()
        for age, chunk_id, slot in sorted(found):
            stale = self._places.pop(chunk_id, None)
            if stale is not None:
                self._free.append(stale)
            self._places[chunk_id] = slot
            self._age = age

    def _take_slot(self) -> int | None:
        """A slot to write to; the caller holds the lock."""
        if not self._free:
            self._evict()
        return self._free.pop() if self._free else None

    def _evict(self) -> None:
        """Of a few candidates one that goes: what is protected counts as used just now."""
        for _ in range(min(len(self._places), _CANDIDATES)):
            chunk_id = next(iter(self._places))
            if not self._protections.covers(chunk_id):
                self._drop(chunk_id)
                self._counts["evicted"] += 1
                return
            self._places.move_to_end(chunk_id)

    def _drop(self, chunk_id: bytes) -> None:
        slot = self._places.pop(chunk_id)
        self._enter(slot, _EMPTY)
        self._free.append(slot)

    def _enter(self, slot: int, entry: bytes) -> None:
        try:
            _write(self._table, entry, slot * _ENTRY.size)
        except OSError as error:  # a stale entry is found out when its slot is read
            self._failed("write", error)

    def _failed(self, what: str, error: OSError) -> None:
        self._counts["failures"] += 1
        if self._counts["failures"] == 1:
            log.warning("the chunk cache cannot %s, going on without it: %s", what, error)


class _Protections:
    """How often chunks are protected, counted by a few bits of their ids.

    64 snapshots have a million windows: counting whole ids would take more memory than all else.
    Two ids that share a counter are both protected while one is. Not safe for threads.
    """

    def __init__(self) -> None:
        self._counts = array.array("I", bytes(4 * _COUNTERS))
        self.total = 0

    def add(self, chunk_ids: bytes, change: int) -> None:
        """Change the counts of ids that stand one after the other."""
        counts = self._counts
        for number in array.array("Q", chunk_ids)[:: ID_BYTES // 8]:
            counts[number % _COUNTERS] += change
        self.total += change * (len(chunk_ids) // ID_BYTES)

    def covers(self, chunk_id: bytes) -> bool:
        """Whether an id is protected, or seems so."""
        return self._counts[array.array("Q", chunk_id[:8])[0] % _COUNTERS] > 0


def _check_of(chunk_id: bytes, content: bytes | memoryview) -> int:
    return xxh3_64_intdigest(content, int.from_bytes(chunk_id[:8], "little"))


def _runs(slots: list[int]) -> Iterator[tuple[int, int]]:
    """Where slots that follow each other begin and end in the list."""
    breaks = [at for at, (one, next_) in enumerate(pairwise(slots), 1) if next_ != one + 1]
    return pairwise([0, *breaks, len(slots)] if slots else [])


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _lock(descriptor: int, directory: Path, *, is_left: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not is_left:
            raise Conflict(f"another process uses the chunk cache in {directory}") from None


def _write(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def open_or_none(
    directory: Path, *, capacity_bytes: int, predecessor_died: bool = False
) -> ChunkCache | None:
    """The cache, or None when the disk does not let it be opened: the pager works without."""
    try:
        return ChunkCache(
            directory, capacity_bytes=capacity_bytes, predecessor_died=predecessor_died
        )
    except OSError as error:
        log.warning("no chunk cache in %s, going on without it: %s", directory, error)
        return None
