"""The node's chunk cache: windows by chunk id in slots of one file, bounded, verified when read.

    DIR/slots    slot n is the WINDOW_BYTES from n * WINDOW_BYTES on
    DIR/table    48 bytes a slot: chunk id (32), length (4), zero (4), age (8), little-endian

A slot is written before its table entry, and what a slot holds is compared with its id whenever it
is read, so a crash, a flipped bit or a foreign file costs a fetch and never gives wrong bytes.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import logging
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import Conflict
from torpor.snapshot.repository.chunks import ID_BYTES
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_ENTRY: Final = struct.Struct("<32sIIQ")
_EMPTY: Final = bytes(_ENTRY.size)

log = logging.getLogger("torpor.pager")


@dataclass(frozen=True)
class CacheCounters:
    """What a cache did since it was opened, and what it holds: chunks and bytes of capacity."""

    hits: int
    misses: int
    damaged: int
    failures: int
    chunks: int
    protected: int
    capacity_bytes: int


class ChunkCache:
    """Windows on disk by chunk id, at most `capacity_bytes`; any thread may call.

    What does not work on the disk (full, read-only, gone) makes it forget, never raise: a cache
    that fails is one that misses. Eviction takes what was used longest ago and is not protected.
    """

    def __init__(self, directory: Path, *, capacity_bytes: int) -> None:
        """Open the cache in a directory, made if need be; one process at a time.

        Raises Conflict while another process has it, OSError when it cannot be opened at all.
        """
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.capacity_bytes = capacity_bytes
        self._slots_total = max(1, capacity_bytes // WINDOW_BYTES)
        self._slots = os.open(directory / "slots", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._table = self._open_table(directory)
        except BaseException:
            os.close(self._slots)
            raise
        self._lock = threading.Lock()
        self._places: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._free: list[int] = []
        self._protected: collections.Counter[bytes] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        self._age = 0
        self._load()

    def get(self, chunk_id: bytes, hash_of: Callable[[bytes], bytes]) -> bytes | None:
        """A chunk's content, None if it is not here or not right; `hash_of` gives content's id."""
        with self._lock:
            slot = self._places.get(chunk_id)
            if slot is None:
                self._counts["misses"] += 1
                return None
            self._places.move_to_end(chunk_id)
            length = _ENTRY.unpack_from(self._table, slot * _ENTRY.size)[1]
        try:
            content = os.pread(self._slots, length, slot * WINDOW_BYTES)
        except OSError as error:
            self._failed("read", error)
            content = b""
        if hash_of(content) == chunk_id:
            self._counts["hits"] += 1
            return content
        with self._lock:
            if self._places.get(chunk_id) == slot:  # not evicted and written over meanwhile
                self._counts["damaged"] += 1
                self._drop(chunk_id)
            self._counts["misses"] += 1
        return None

    def has(self, chunk_id: bytes) -> bool:
        """Whether a chunk seems to be here, without reading it."""
        return chunk_id in self._places

    def put(self, chunk_id: bytes, content: bytes | memoryview) -> None:
        """Keep a verified chunk, if there is room that nothing protected takes."""
        with self._lock:
            if chunk_id in self._places:
                return
            slot = self._take_slot()
            if slot is None:
                return
            self._age += 1
            age = self._age
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
            entry = _ENTRY.pack(chunk_id, len(content), 0, age)
            self._table[slot * _ENTRY.size : (slot + 1) * _ENTRY.size] = entry
            self._places[chunk_id] = slot

    def protect(self, chunk_ids: Iterable[bytes]) -> None:
        """Keep chunks from eviction, those that come later too, until as many `unprotect`."""
        with self._lock:
            self._protected.update(chunk_ids)

    def unprotect(self, chunk_ids: Iterable[bytes]) -> None:
        """Take one protection from each of the chunks."""
        with self._lock:
            self._protected.subtract(chunk_ids)
            self._protected += collections.Counter()

    def counters(self) -> CacheCounters:
        """What it did and holds."""
        with self._lock:
            return CacheCounters(
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                damaged=self._counts["damaged"],
                failures=self._counts["failures"],
                chunks=len(self._places),
                protected=len(self._protected),
                capacity_bytes=self.capacity_bytes,
            )

    def close(self) -> None:
        """Let another process have it."""
        self._table.close()
        os.close(self._slots)

    def _open_table(self, directory: Path) -> mmap.mmap:
        size = self._slots_total * _ENTRY.size
        descriptor = os.open(directory / "table", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:  # on the slots' descriptor, which stays open
                fcntl.flock(self._slots, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(f"another process uses the chunk cache in {directory}") from None
            os.truncate(descriptor, size)
            os.posix_fallocate(descriptor, 0, size)  # a hole that cannot be filled is a SIGBUS
            os.truncate(self._slots, self._slots_total * WINDOW_BYTES)
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def _load(self) -> None:
        found: list[tuple[int, bytes, int]] = []
        for slot, (chunk_id, length, zero, age) in enumerate(_ENTRY.iter_unpack(self._table)):
            if 0 < length <= WINDOW_BYTES and zero == 0:
                found.append((age, chunk_id, slot))
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
        if self._free:
            return self._free.pop()
        for chunk_id in self._oldest():
            self._drop(chunk_id)
            return self._free.pop()
        return None

    def _oldest(self) -> Iterator[bytes]:
        """At most a few candidates: protected ones that are met are taken for used just now."""
        for _ in range(min(len(self._places), len(self._protected) + 1)):
            chunk_id = next(iter(self._places))
            if chunk_id not in self._protected:
                yield chunk_id
                return
            self._places.move_to_end(chunk_id)

    def _drop(self, chunk_id: bytes) -> None:
        slot = self._places.pop(chunk_id)
        self._table[slot * _ENTRY.size : (slot + 1) * _ENTRY.size] = _EMPTY
        self._free.append(slot)

    def _failed(self, what: str, error: OSError) -> None:
        self._counts["failures"] += 1
        if self._counts["failures"] == 1:
            log.warning("the chunk cache cannot %s, going on without it: %s", what, error)


def _write(descriptor: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def open_or_none(directory: Path, *, capacity_bytes: int) -> ChunkCache | None:
    """The cache, or None when the disk does not let it be opened: the pager works without."""
    with contextlib.suppress(OSError):
        return ChunkCache(directory, capacity_bytes=capacity_bytes)
    log.warning("the chunk cache in %s cannot be opened, going on without it", directory)
    return None


assert ID_BYTES == 32
