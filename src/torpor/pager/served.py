"""Files that a pager serves: their windows found in the chunk cache, else in the store."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torpor.errors import TorporError
from torpor.host.fuse.files import Tree
from torpor.pager.expected import Arrival, Expected
from torpor.pager.fetcher import GAP_BYTES, Chunk, Fetcher, Priority
from torpor.snapshot.repository.records import damaged
from torpor.snapshot.repository.repository import pack_key
from torpor.snapshot.windows import WINDOW_BYTES, count_windows, window_length

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torpor.host.fuse.files import Buffer, Call, Data, Node
    from torpor.pager.cache import ChunkCache
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import Entry, FileMap
    from torpor.store.interface import Store

_ZEROS: Final = bytes(WINDOW_BYTES)
_EXPECT_S: Final = 0.5
_BESIDE_WINDOWS: Final = 7

log = logging.getLogger("torpor.pager")


@dataclass
class Counters:
    """What a file's readers asked for, windows by where they were, and how long they stood still.

    `zero` windows are nowhere, `cache` is the chunk cache, `store` came from the bucket meanwhile,
    `pushed` were put into the page cache ahead of any reader, `awaited` were read while a push
    brought them. Times are in seconds, summed over reads, each counted where its slowest window
    was.
    """

    reads: int = 0
    zero: int = 0
    cache: int = 0
    store: int = 0
    pushed: int = 0
    awaited: int = 0
    stalled_s: dict[str, float] = field(
        default_factory=lambda: {"zero": 0.0, "awaited": 0.0, "cache": 0.0, "store": 0.0}
    )


@dataclass(frozen=True)
class Content:
    """Where each window of a file lies, and the domain that opens its chunks."""

    map: FileMap
    domain: Domain


@dataclass
class StoredFile:
    """A file whose windows are chunks in a store. Any thread may read it.

    Its map may be on its way still: a read then waits for it. `failure` says which window could not
    be had last, and why; `note_failure` is told before the read is. From then on every read that
    needs the store fails at once, so that the VM which maps the file ends and nobody waits again,
    until `try_again`.
    """

    size_bytes: int
    arriving: concurrent.futures.Future[Content]
    store: Store
    cache: ChunkCache | None
    fetcher: Fetcher
    counters: Counters = field(default_factory=Counters)
    failure: str = ""
    note_failure: Callable[[str], None] = lambda failure: None
    expected: Expected = field(default_factory=Expected)
    """Windows that a push brings, until they are in the page cache: they need no map."""
    _refuses: bool = False
    _known: Content | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._pushed = bytearray(count_windows(self.size_bytes))

    @property
    def map(self) -> FileMap:
        """Where each window lies. Blocks until that is known; raises what kept it from coming."""
        return self._content.map

    @property
    def known_map(self) -> FileMap | None:
        """The map if it is here."""
        if not self.arriving.done() or self.arriving.exception() is not None:
            return None
        return self.arriving.result().map

    def give_up(self, failure: TorporError) -> None:
        """The map does not come any more; nothing happens if it is here."""
        if not self.arriving.done():
            self.arriving.set_exception(failure)

    @property
    def _content(self) -> Content:
        return self.arriving.result()

    def read(
        self, offset: int, length: int, may_wait: Callable[[], None] = lambda: None
    ) -> list[Buffer]:
        """The bytes from `offset`, in pieces. Raises OSError when a window cannot be had.

        `may_wait` is called before anything that may take long (see `host.fuse.files.Call`).
        """
        began = time.perf_counter()
        end = offset + length
        first, last = offset // WINDOW_BYTES, (end - 1) // WINDOW_BYTES
        windows = range(first, last + 1)
        awaited = 0
        if coming := self.expected.among(windows):
            may_wait()
            pieces, slowest, awaited = self._coming_contents(windows, coming)
        else:
            pieces, slowest = self._contents(windows, may_wait)
        if offset % WINDOW_BYTES or end % WINDOW_BYTES:
            for window in {first, last}:
                piece = pieces[window - first]
                pieces[window - first] = _cut(piece, window, offset, end, self.size_bytes)
        with self._lock:
            self.counters.reads += 1
            self.counters.awaited += awaited
            self.counters.stalled_s[slowest] += time.perf_counter() - began
        return pieces

    def try_again(
        self, arriving: Callable[[], concurrent.futures.Future[Content]] | None = None
    ) -> None:
        """Ask the store again although a window could not be had.

        With `arriving` also for a map that failed.
        """
        self._refuses = False
        if arriving and self.arriving.done() and self.arriving.exception() is not None:
            self.arriving = arriving()

    def note_pushed(self, windows: Sequence[int]) -> None:
        """These were put into the page cache: nobody will read them for long."""
        with self._lock:
            self.counters.pushed += len(windows)
            for window in windows:
                self._pushed[window] = True

    def chunk(self, entry: Entry) -> Chunk:
        """What the fetcher needs to know of a window."""
        place = entry.location
        key = pack_key(place.pack)
        domain = self._content.domain
        return Chunk(self.store, key, place.offset, place.length, entry.chunk_id, domain)

    def is_here(self, entry: Entry) -> bool:
        """Whether the chunk cache seems to have a window."""
        return self.cache is not None and self.cache.has(entry.chunk_id)

    def _coming_contents(
        self, windows: Sequence[int], coming: dict[int, Arrival]
    ) -> tuple[list[Buffer], str, int]:
        """Windows of which some are expected, the class of the slowest, how many were brought."""
        contents, slowest = self._by_window([window for window in windows if window not in coming])
        brought = self._brought(coming)
        if brought and slowest != "store":
            slowest = "awaited"
        if late := [window for window in coming if window not in brought]:
            others, slowest = self._by_window(late)
            contents |= others
        contents |= brought
        return [contents[window] for window in windows], slowest, len(brought)

    def _by_window(self, windows: Sequence[int]) -> tuple[dict[int, Buffer], str]:
        if not windows:
            return {}, "zero"
        pieces, slowest = self._contents(windows)
        return dict(zip(windows, pieces, strict=True)), slowest

    def _brought(self, coming: dict[int, Arrival]) -> dict[int, Buffer]:
        """What arrives of it within a while, for a push may be held up and a reader may not."""
        until_s = time.monotonic() + _EXPECT_S
        found: dict[int, Buffer] = {}
        for window, arrival in coming.items():
            content = arrival.wait(window, max(0.0, until_s - time.monotonic()))
            if content is not None:
                found[window] = content
        return found

    def _contents(
        self, windows: Sequence[int], may_wait: Callable[[], None] = lambda: None
    ) -> tuple[list[Buffer], str]:
        """Windows in rising order from where they lie, counted, and the class of the slowest."""
        known = self._known or self._await_content(windows[0], may_wait)
        ids = known.map.ids_between(windows[0], windows[-1])
        if len(ids) != len(windows):
            ids = [ids[window - windows[0]] for window in windows]
        wanted = dict.fromkeys(filter(None, ids))
        found: dict[bytes, Buffer] = {}
        if self.cache is not None and wanted:
            found.update(self.cache.get(wanted, may_wait))
        missing: dict[int, Entry] = {}
        if len(found) < len(wanted):
            may_wait()
            entries = ((window, known.map.get(window)) for window in windows)
            missing = {w: entry for w, entry in entries if entry and entry.chunk_id not in found}
            found.update(self._fetch(missing))
        pieces: list[Buffer] = [found[chunk_id] if chunk_id else _ZEROS for chunk_id in ids]
        whole = self.size_bytes // WINDOW_BYTES
        for window, piece in zip(windows, pieces, strict=True):
            if len(piece) != WINDOW_BYTES or window >= whole:
                self._check(window, piece, known.map.get(window))
        zero = ids.count(None)
        with self._lock:
            self.counters.zero += zero
            self.counters.store += len(missing)
            self.counters.cache += len(windows) - zero - len(missing)
        if missing:
            return pieces, "store"
        return pieces, "zero" if zero == len(windows) else "cache"

    def _await_content(self, window: int, may_wait: Callable[[], None]) -> Content:
        if not self.arriving.done():
            may_wait()
        try:
            self._known = self._content
        except TorporError as error:
            raise self._failed(window, error) from None
        return self._known

    def _fetch(self, missing: dict[int, Entry]) -> dict[bytes, bytes]:
        if self._refuses:
            raise OSError(self.failure)
        try:
            return self.fetcher.fetch(
                map(self.chunk, missing.values()),
                Priority.DEMAND,
                beside=map(self.chunk, self._beside(missing)),
            )
        except TorporError as error:
            raise self._failed(min(missing), error) from None

    def _beside(self, missing: dict[int, Entry]) -> Iterator[Entry]:
        """What follows the last of them, in the store too, and is not here: it fits its request."""
        if self.cache is None:  # nothing would keep it
            return
        window, last = max(missing.items())
        after = range(window + 1, min(window + 1 + _BESIDE_WINDOWS, len(self._pushed)))
        coming = self.expected.among(after)
        for number in after:
            entry = self.map.get(number)
            if entry is None or self._pushed[number] or number in coming or self.is_here(entry):
                continue
            place, end = entry.location, last.location.offset + last.location.length
            if place.pack != last.location.pack or not 0 <= place.offset - end <= GAP_BYTES:
                return
            yield entry
            last = entry

    def _check(self, window: int, content: Buffer, entry: Entry | None) -> None:
        expected = window_length(window, self.size_bytes)
        if entry is not None and len(content) != expected:
            wrong = f"a chunk of {len(content)} bytes for a window of {expected}"
            raise self._failed(window, damaged(pack_key(entry.location.pack), wrong))

    def _failed(self, window: int, error: TorporError) -> OSError:
        self.failure = f"window {window}: {error}"
        self._refuses = True
        self.note_failure(self.failure)
        return OSError(self.failure)


@dataclass
class LocalFile:
    """A file of this node, whose reads are put down: what a trial learns a working set from."""

    path: Path
    size_bytes: int
    _descriptor: int = -1
    _touched: dict[int, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def read(
        self, offset: int, length: int, may_wait: Callable[[], None] = lambda: None
    ) -> list[Buffer]:
        """The bytes from `offset`. Raises OSError. `may_wait` is called before it reads."""
        first, last = offset // WINDOW_BYTES, (offset + length - 1) // WINDOW_BYTES
        self._touched.update(dict.fromkeys(range(first, last + 1)))
        may_wait()
        return [os.pread(self._descriptor, length, offset)]

    def touched(self) -> tuple[int, ...]:
        """The windows that were read so far, in the order of their first read."""
        return tuple(self._touched)

    def close(self) -> None:
        """Free the descriptor."""
        os.close(self._descriptor)


class ServedFiles(Tree):
    """The files of a mount by path: what the FUSE server asks (see `host.fuse.files.Files`)."""

    def __init__(self) -> None:
        super().__init__()
        self._content: dict[int, StoredFile | LocalFile] = {}

    def serve(self, parts: Sequence[str], file: StoredFile | LocalFile) -> Node:
        """Let a file appear; the same path again replaces nothing."""
        node = self.add(parts, size_bytes=file.size_bytes)
        self._content.setdefault(node.id, file)
        return node

    def withdraw(self, parts: Sequence[str]) -> Node:
        """Take a file away. Raises FileNotFoundError."""
        node = self.remove(parts)
        self._content.pop(node.id, None)
        return node

    def read(self, node: Node, offset: int, length: int, call: Call, /) -> Data:
        """See Files."""
        content = self._content.get(node.id)
        if content is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        try:
            return content.read(offset, length, call.may_wait)
        except OSError as error:
            log.error("read failed file=%s offset=%d error=%s", "/".join(node.parts), offset, error)
            raise OSError(errno.EIO, str(error)) from None


def _cut(content: Buffer, window: int, begin: int, end: int, size_bytes: int) -> Buffer:
    """The part of a window that lies in [begin, end)."""
    origin = window * WINDOW_BYTES
    length = window_length(window, size_bytes)
    first, last = max(0, begin - origin), min(length, end - origin)
    if first == 0 and last == len(content):
        return content
    return memoryview(content)[first:last]
