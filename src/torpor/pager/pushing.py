"""Pushing a working set: segments of a wake object, fetched in order, put into the page cache.

Stages overlap: some threads fetch, each opens what it fetched, and stores it. The kernel makes a
thread that stores pages under a read wait for that read's answer, so these are threads of their own
(see `host.fuse.server`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torpor.errors import Damaged, TorporError
from torpor.host.threads import map_ordered
from torpor.snapshot.repository.records import hash_bytes
from torpor.snapshot.repository.working_set import open_segment, segment_windows
from torpor.snapshot.windows import WINDOW_BYTES, window_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torpor.host.fuse.files import Node
    from torpor.host.fuse.server import Server
    from torpor.pager.served import StoredFile
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.records import SegmentRecord, WakeLink
    from torpor.store.interface import Store

_REQUEST_BYTES: Final = 1 << 20
_FIRST_REQUEST_BYTES: Final = 256 << 10
_WORKERS: Final = 4

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
    first_s: float = 0.0
    ended_s: float = 0.0
    failure: str = ""


@dataclass
class _Batch:
    offset: int
    length: int
    segments: list[SegmentRecord] = field(default_factory=list)


class Pusher:
    """Pushes one snapshot's working set in the background; `wait` for its end.

    `targets` are the served files by the names that segments use, and their nodes.
    """

    def __init__(
        self,
        wake: WakeData,
        server: Server,
        targets: dict[str, tuple[StoredFile, Node]],
        *,
        kept: Path | None,
    ) -> None:
        self._wake = wake
        self._server = server
        self._targets = targets
        self._kept = kept
        self._lock = threading.Lock()
        self.counters = PushCounters()
        self._stop = threading.Event()
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)

    def start(self) -> None:
        """Begin to fetch; returns at once. Nothing is pushed before `go`."""
        self.counters.began_s = time.monotonic()
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when time is up."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def go(self) -> None:
        """Push: somebody has opened the files, so the kernel has a page cache for them."""
        self._known.set()

    def stop(self) -> None:
        """Begin nothing more."""
        self._stop.set()
        self._known.set()

    def _run(self) -> None:
        try:
            source = self._open_kept() or self._from_store
            batches = _batches(self._wake.segments)
            work = lambda batch: self._push(batch, source)  # noqa: E731
            for _ in map_ordered(work, batches, workers=_WORKERS, ahead=_WORKERS):
                if self._stop.is_set():
                    break
        except TorporError as error:  # demand reads get what the push did not bring
            self.counters.failure = str(error)
            log.warning("working set not pushed key=%s error=%s", self._wake.link.key, error)
        except OSError as error:
            self.counters.failure = str(error)
            log.info("push ended key=%s error=%s", self._wake.link.key, error)
        self.counters.ended_s = time.monotonic()

    def _push(self, batch: _Batch, source: Callable[[int, int], bytes]) -> None:
        if self._stop.is_set():
            return
        data = memoryview(source(batch.offset, batch.length))
        for record in batch.segments:
            begin = record.offset - batch.offset
            self._store(record, data[begin : begin + record.length])

    def _store(self, record: SegmentRecord, sealed: memoryview) -> None:
        target = self._targets.get(record.file)
        if target is None:
            return
        file, node = target
        try:
            windows = segment_windows(record, data_bytes=record.offset + record.length)
            content = open_segment(
                self._wake.domain, self._wake.link.key, record, sealed, size_bytes=file.size_bytes
            )
        except Damaged as error:
            raise Damaged(
                f"object {self._wake.link.key} in the store is damaged", reason=str(error)
            ) from None
        self._known.wait()
        for window, piece in _runs(windows, memoryview(content), file.size_bytes):
            if self._stop.is_set():
                return
            with contextlib.suppress(FileNotFoundError):  # nobody has opened the file
                self._server.store(node, window * WINDOW_BYTES, piece)
        with self._lock:
            self.counters.first_s = self.counters.first_s or time.monotonic()
            self.counters.windows += len(windows)
            file.counters.pushed += len(windows)

    def _from_store(self, offset: int, length: int) -> bytes:
        origin = self._wake.link.header_bytes
        data = self._wake.store.get_range(self._wake.link.key, origin + offset, length)
        with self._lock:
            self.counters.fetched_bytes += length
        if self._kept is not None:
            self._keep(offset, data)
        return data

    def _keep(self, offset: int, data: bytes) -> None:
        """Write to this node's copy of the wake object's working set, for the next time."""
        assert self._kept is not None
        try:
            descriptor = os.open(self._kept, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, data, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.info("working set not kept path=%s error=%s", self._kept, error)

    def _open_kept(self) -> Callable[[int, int], bytes] | None:
        """Reads from this node's copy; what is not right in it comes from the store."""
        if self._kept is None or not self._wake.segments or not self._kept.exists():
            return None
        by_offset = {record.offset: record for record in self._wake.segments}

        def read(offset: int, length: int) -> bytes:
            assert self._kept is not None
            try:
                with self._kept.open("rb") as stream:
                    stream.seek(offset)
                    data = stream.read(length)
            except OSError:
                data = b""
            first = by_offset[offset]
            if len(data) == length and _is_right(first, data[: first.length]):
                return data
            return self._from_store(offset, length)

        return read


def _is_right(record: SegmentRecord, sealed: bytes) -> bool:
    return hash_bytes(sealed) == record.hash


def _batches(segments: Sequence[SegmentRecord]) -> Iterator[_Batch]:
    """Neighbouring segments in requests: a small first one, for the guest waits for that."""
    batch: _Batch | None = None
    limit = _FIRST_REQUEST_BYTES
    for record in segments:
        if batch is not None and (
            record.offset != batch.offset + batch.length or batch.length + record.length > limit
        ):
            yield batch
            batch, limit = None, _REQUEST_BYTES
        if batch is None:
            batch = _Batch(record.offset, 0)
        batch.length += record.length
        batch.segments.append(record)
    if batch is not None:
        yield batch


def _runs(
    windows: Sequence[int], content: memoryview, size_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """The content cut where the windows do not follow each other: (first window, bytes)."""
    begin = position = 0
    first = windows[0]
    for number, window in enumerate(windows):
        if window != first + (number - begin):
            yield first, content[:position]
            content = content[position:]
            begin, position, first = number, 0, window
        position += window_length(window, size_bytes)
    yield first, content[:position]
