"""Pushing a working set: segments of a wake object, fetched in order, put into the page cache.

Stages overlap: some threads fetch, each opens what it fetched, and stores it. The kernel makes a
thread that stores pages under a read wait for that read's answer, so these are threads of their own
(see `host.fuse.server`). All pushes share the room for what they hold in memory.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from torpor.errors import Damaged, TorporError
from torpor.host.fuse.protocol import MAX_READ_BYTES
from torpor.host.threads import map_ordered
from torpor.pager.expected import Arrival
from torpor.snapshot.repository.records import damaged
from torpor.snapshot.repository.working_set import open_segment, segment_windows
from torpor.snapshot.windows import WINDOW_BYTES, window_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torpor.host.fuse.files import Node
    from torpor.host.fuse.server import Server
    from torpor.pager.expected import Expected
    from torpor.pager.kept import KeptCopies
    from torpor.pager.served import StoredFile
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.records import SegmentRecord, WakeLink
    from torpor.store.interface import Store

_REQUEST_BYTES: Final = 1 << 20
_FIRST_REQUEST_BYTES: Final = 256 << 10
_WORKERS: Final = 8
_BATCHES_AT_ONCE: Final = 12
_PATIENCE_S: Final = 5.0

log = logging.getLogger("torpor.pager")


@dataclass(frozen=True)
class WakeData:
    """The data of a wake object: where it is, how its working set lies in it, what opens it."""

    store: Store
    link: WakeLink
    domain: Domain
    segments: tuple[SegmentRecord, ...]


@dataclass
class PushCounters:
    """What a push did: bytes fetched, windows pushed, and when, in seconds of CLOCK_MONOTONIC.

    `first_s` is when the first window was in the page cache. A moment that has not come is 0.
    """

    fetched_bytes: int = 0
    windows: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    first_s: float = 0.0
    failure: str = ""


class Room:
    """How much all pushes of a process may hold in memory: so many batches of segments."""

    def __init__(self, batches: int = _BATCHES_AT_ONCE) -> None:
        self.taken = threading.BoundedSemaphore(batches)


class Pusher:
    """Pushes one snapshot's working set in the background, `after` something; `wait` for its end.

    `targets` are the served files by the names that segments use, and their nodes. Nothing is
    stored before `mapped` is set: somebody has opened the files, so the kernel has a page cache for
    them. `beginning` are the wake object's first bytes, which are not asked for again. What is at
    hand already, `at_hand`, readers have until the end. `trace` is told "push fetched" and "push
    storing", in a thread of the push.
    """

    def __init__(
        self,
        wake: WakeData,
        server: Server,
        targets: dict[str, tuple[StoredFile, Node]],
        *,
        kept: KeptCopies,
        room: Room,
        mapped: threading.Event,
        beginning: bytes = b"",
        after: threading.Event | None = None,
        at_hand: Sequence[tuple[Expected, Arrival]] = (),
        patience_s: float = _PATIENCE_S,
        trace: Callable[[str], None] = lambda place: None,
    ) -> None:
        self._wake = wake
        self._server = server
        self._targets = targets
        self._kept = kept
        self._room = room
        self._beginning = beginning
        self._after = after
        self._at_hand = at_hand
        self._patience_s = patience_s
        self._trace = trace
        self._name = wake.link.hash.hex()
        self._lock = threading.Lock()
        self.counters = PushCounters()
        self._stop = threading.Event()
        self.mapped = mapped
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def start(self) -> Self:
        """Begin to fetch, after what there is to wait for; returns at once."""
        self._thread.start()
        return self

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when time is up."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()
        self.mapped.set()
        if self._after is not None:
            self._after.set()

    def _run(self) -> None:
        if self._after is not None:
            self._after.wait()
        self.counters.began_s = time.monotonic()
        try:
            here_bytes = len(self._beginning) - self._wake.link.header_bytes
            batches = _batches(self._wake.segments, here_bytes)
            for _ in map_ordered(self._push, batches, workers=_WORKERS, ahead=4 * _WORKERS):
                if self._stop.is_set():
                    break
        except TorporError as error:  # demand reads get what the push did not bring
            self.counters.failure = str(error)
            log.warning("working set not pushed key=%s error=%s", self._wake.link.key, error)
        except OSError as error:
            self.counters.failure = str(error)
            log.info("push ended key=%s error=%s", self._wake.link.key, error)
        self._kept.used(self._name)
        for expected, arrival in self._at_hand:
            expected.remove(arrival)
        self._at_hand, self._beginning = (), b""
        self.counters.ended_s = time.monotonic()

    def _push(self, batch: Sequence[SegmentRecord]) -> None:
        """Fetch, then store when the files are open; meanwhile nothing is held for long."""
        if self._stop.is_set():
            return
        with self._room.taken, self._expected(batch) as arrivals:
            data, is_new = self._read(batch)
            in_time = self.mapped.wait(self._patience_s)
            if in_time:
                self._store_batch(batch, arrivals, data)
            if is_new:  # last: a guest waits for pages, nobody for the copy
                self._kept.write(self._name, batch[0].offset, data)
            if in_time:
                return
            del data
        self.mapped.wait()
        with self._room.taken, self._expected(batch) as arrivals:
            if not self._stop.is_set():
                self._store_batch(batch, arrivals, self._read(batch)[0])

    @contextlib.contextmanager
    def _expected(self, batch: Sequence[SegmentRecord]) -> Iterator[list[Arrival]]:
        """Let readers wait for a batch during the body. Raises Damaged."""
        arrivals = []
        for record in batch:
            try:
                windows = segment_windows(record, data_bytes=record.offset + record.length)
            except Damaged as error:
                raise damaged(self._wake.link.key, str(error)) from None
            arrivals.append(Arrival(windows))
        both = [
            (self._targets[record.file][0].expected, arrival)
            for record, arrival in zip(batch, arrivals, strict=True)
            if record.file in self._targets
        ]
        for expected, arrival in both:
            expected.add(arrival)
        try:
            yield arrivals
        finally:
            for expected, arrival in both:
                arrival.give_up()
                expected.remove(arrival)

    def _store_batch(
        self, batch: Sequence[SegmentRecord], arrivals: Sequence[Arrival], data: bytes
    ) -> None:
        """All of it is opened before any is stored: that waits for reads, which wait for this."""
        opened = []
        for record, arrival in zip(batch, arrivals, strict=True):
            if record.file not in self._targets or self._stop.is_set():
                continue
            file, node = self._targets[record.file]
            begin = record.offset - batch[0].offset
            content = self._open(record, memoryview(data)[begin : begin + record.length], file)
            arrival.bring(content, size_bytes=file.size_bytes)
            opened.append((file, node, arrival, content))
        for file, node, arrival, content in opened:
            self._trace("push storing")
            for window, piece in _runs(arrival.windows, memoryview(content), file.size_bytes):
                if self._stop.is_set():
                    return
                with contextlib.suppress(FileNotFoundError):  # nobody has opened the file
                    self._server.store(node, window * WINDOW_BYTES, piece)
                    self._count(file, range(window, window - (-len(piece) // WINDOW_BYTES)))

    def _open(self, record: SegmentRecord, sealed: memoryview, file: StoredFile) -> bytes:
        key = self._wake.link.key
        try:
            return open_segment(self._wake.domain, key, record, sealed, size_bytes=file.size_bytes)
        except Damaged as error:
            raise damaged(key, str(error)) from None

    def _count(self, file: StoredFile, windows: range) -> None:
        with self._lock:
            self.counters.first_s = self.counters.first_s or time.monotonic()
            self.counters.windows += len(windows)
        file.note_pushed(windows)

    def _read(self, batch: Sequence[SegmentRecord]) -> tuple[bytes, bool]:
        """A batch from this node's copy if all of it is right there, else from the store.

        With it whether the copy lacks it.
        """
        data = self._kept.read(self._name, batch)
        if data is not None:
            return data, False
        link = self._wake.link
        begin = link.header_bytes + batch[0].offset
        end = link.header_bytes + batch[-1].offset + batch[-1].length
        if end <= len(self._beginning):
            data = self._beginning[begin:end]
        else:
            data = self._wake.store.get_range(link.key, begin, end - begin)
        with self._lock:
            self.counters.fetched_bytes += len(data)
        self._trace("push fetched")
        return data, True


def _batches(segments: Sequence[SegmentRecord], here_bytes: int) -> Iterator[list[SegmentRecord]]:
    """Segments that follow each other in requests: a small first one, the guest waits for that.

    What lies in the first `here_bytes` needs no request and comes first of all.
    """
    batch: list[SegmentRecord] = []
    here, limit = True, _FIRST_REQUEST_BYTES
    for record in segments:
        is_here = here and record.offset + record.length <= here_bytes
        if batch and not (is_here == here and _joins(batch, record, here_bytes if here else limit)):
            yield batch
            batch, limit = [], _FIRST_REQUEST_BYTES if here else _REQUEST_BYTES
        here = is_here
        batch.append(record)
    if batch:
        yield batch


def _joins(batch: list[SegmentRecord], record: SegmentRecord, limit: int) -> bool:
    end = batch[-1].offset + batch[-1].length
    return record.offset == end and end + record.length - batch[0].offset <= limit


def _runs(
    windows: Sequence[int], content: memoryview, size_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """The content cut where windows do not follow each other, and before a store's most bytes.

    Each piece is its first window and its bytes.
    """
    begin = position = 0
    first = windows[0]
    for number, window in enumerate(windows):
        length = window_length(window, size_bytes)
        if window != first + (number - begin) or position + length > MAX_READ_BYTES:
            yield first, content[:position]
            content = content[position:]
            begin, position, first = number, 0, window
        position += length
    yield first, content[:position]
