"""Fetching chunks from the store: each once however many want it, near ones in one request.

Wants wait in three queues: what a guest stands still for, what is going to be pushed, what is
hydrated in the background. A worker takes the oldest of the most urgent queue and, from all queues,
what lies next to it in the same object.
"""

from __future__ import annotations

import collections
import enum
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from torpor.errors import Damaged, DeadlineExceeded, ObjectMissing, StoreError, TorporError
from torpor.snapshot.repository.fetching import open_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torpor.snapshot.repository.domain import Domain
    from torpor.store.interface import Store

GAP_BYTES: Final = 64 * 1024
_LONGEST_BYTES: Final = {0: 1 << 20, 1: 2 << 20, 2: 2 << 20}
_RETRY_S: Final = 0.2

log = logging.getLogger("torpor.pager")


class Priority(enum.IntEnum):
    """How urgent a chunk is."""

    DEMAND = 0
    WORKING_SET = 1
    HYDRATION = 2


class Chunk(NamedTuple):
    """A chunk in an object of a store, and the domain that opens it."""

    store: Store
    key: str
    offset: int
    length: int
    chunk_id: bytes
    domain: Domain


@dataclass
class _Want:
    chunk: Chunk
    priority: Priority
    deadline_s: float
    done: threading.Event = field(default_factory=threading.Event)
    content: bytes | None = None
    error: TorporError | None = None
    taken: bool = False


@dataclass(frozen=True)
class FetchCounters:
    """GETs, bytes of the chunks that came, how many, and requests that had to be repeated."""

    requests: int
    bytes: int
    chunks: int
    failures: int


class Fetcher:
    """Worker threads over stores. `keep` is given each chunk that arrived, in a worker's thread."""

    def __init__(
        self, *, workers: int, deadline_s: float, keep: Callable[[bytes, bytes], None]
    ) -> None:
        self._deadline_s = deadline_s
        self._keep = keep
        self._condition = threading.Condition()
        self._queues: dict[Priority, collections.deque[_Want]] = {
            priority: collections.deque() for priority in Priority
        }
        self._wants: dict[tuple[int, str, int], _Want] = {}
        self._near: dict[tuple[int, str], dict[int, _Want]] = collections.defaultdict(dict)
        self._counts: collections.Counter[str] = collections.Counter()
        self._ended = False
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def fetch(self, chunks: Iterable[Chunk], priority: Priority) -> dict[bytes, bytes]:
        """The content of chunks by id, verified; blocks until all are here.

        A chunk that is on its way already is waited for, made more urgent if this is. Raises what
        kept one from coming when the deadline is over (DeadlineExceeded, StoreError), or at once
        what no repetition mends: Damaged, ObjectMissing, StoreDenied.
        """
        wants = self.ask(chunks, priority)
        for want in wants:
            want.done.wait()
        found: dict[bytes, bytes] = {}
        for want in wants:
            if want.error is not None:
                raise want.error
            assert want.content is not None
            found[want.chunk.chunk_id] = want.content
        return found

    def ask(self, chunks: Iterable[Chunk], priority: Priority) -> list[_Want]:
        """Queue chunks without waiting for them."""
        now_s = time.monotonic()
        with self._condition:
            wants = [self._ask(chunk, priority, now_s) for chunk in chunks]
            self._condition.notify_all()
        return wants

    def counters(self) -> FetchCounters:
        """What was fetched since the start."""
        with self._condition:
            return FetchCounters(
                requests=self._counts["requests"],
                bytes=self._counts["bytes"],
                chunks=self._counts["chunks"],
                failures=self._counts["failures"],
            )

    def close(self) -> None:
        """End the workers; what still waits fails."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _ask(self, chunk: Chunk, priority: Priority, now_s: float) -> _Want:
        place = (id(chunk.store), chunk.key, chunk.offset)
        want = self._wants.get(place)
        if want is None:
            want = self._wants[place] = _Want(chunk, priority, now_s + self._deadline_s)
            self._near[place[:2]][chunk.offset] = want
            self._queues[priority].append(want)
        elif not want.taken and priority < want.priority:
            want.priority = priority  # it stays in its old queue too, where it is skipped
            self._queues[priority].append(want)
        if priority is Priority.DEMAND:
            want.deadline_s = max(want.deadline_s, now_s + self._deadline_s)
        return want

    def _work(self) -> None:
        while True:
            with self._condition:
                batch = self._next()
                while not batch:
                    if self._ended:
                        return
                    self._condition.wait()
                    batch = self._next()
            self._serve(batch)

    def _next(self) -> list[_Want]:
        """What one request brings; the caller holds the lock."""
        for priority in Priority:
            queue = self._queues[priority]
            while queue:
                want = queue.popleft()
                if not want.taken and not want.done.is_set():
                    return self._gather(want)
        return []

    def _gather(self, first: _Want) -> list[_Want]:
        """The want and its untaken neighbours that fit into one request."""
        near = self._near[id(first.chunk.store), first.chunk.key]
        batch = [first]
        begin, end = first.chunk.offset, first.chunk.offset + first.chunk.length
        longest = _LONGEST_BYTES[first.priority]
        for want in sorted(near.values(), key=lambda want: want.chunk.offset):
            chunk = want.chunk
            if want is first or want.taken or chunk.offset < begin:
                continue
            if chunk.offset - end > GAP_BYTES or chunk.offset + chunk.length - begin > longest:
                break
            batch.append(want)
            end = max(end, chunk.offset + chunk.length)
        for want in batch:
            want.taken = True
        return batch

    def _serve(self, batch: list[_Want]) -> None:
        first = batch[0].chunk
        begin = first.offset
        end = max(want.chunk.offset + want.chunk.length for want in batch)
        data = b""
        error: TorporError | None = None
        while True:
            try:
                data = first.store.get_range(first.key, begin, end - begin)
                break
            except (ObjectMissing, Damaged) as caught:
                error = caught
                break
            except StoreError as caught:
                with self._condition:
                    self._counts["failures"] += 1
                    late = self._ended or time.monotonic() > max(w.deadline_s for w in batch)
                    if late:
                        error = _too_late(caught, self._deadline_s)
                        break
                    self._condition.wait(_RETRY_S)
            except TorporError as caught:
                error = caught
                break
        for want in batch:
            self._settle(want, data, begin, error)

    def _settle(self, want: _Want, data: bytes, begin: int, error: TorporError | None) -> None:
        chunk = want.chunk
        if error is None:
            piece = memoryview(data)[chunk.offset - begin : chunk.offset - begin + chunk.length]
            try:
                want.content = open_window(chunk.domain, chunk.chunk_id, piece)
                self._keep(chunk.chunk_id, want.content)
            except Damaged as caught:
                error = Damaged(
                    f"object {chunk.key} in the store is damaged",
                    reason=f"{caught}, at offset {chunk.offset}",
                )
        want.error = error
        with self._condition:
            place = (id(chunk.store), chunk.key, chunk.offset)
            if self._wants.get(place) is want:
                del self._wants[place]
                del self._near[place[:2]][chunk.offset]
                if not self._near[place[:2]]:
                    del self._near[place[:2]]
            self._counts["requests"] += want.chunk.offset == begin
            self._counts["bytes"] += chunk.length if error is None else 0
            self._counts["chunks"] += error is None
        want.done.set()


def _too_late(error: StoreError, deadline_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"a window could not be had from the store within {deadline_s:.0f} s", reason=str(error)
    )
