"""Fetching chunks from the store: each once however many want it, near ones in one request.

Wants wait in three queues: what a guest stands still for, what is going to be pushed, what is
hydrated in the background. A worker takes the oldest of the most urgent queue and, from all queues,
what lies next to it in the same object. While the store does not answer, a worker gives what is
less urgent back as soon as a guest waits for something.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from torpor.errors import (
    Damaged,
    DeadlineExceeded,
    InternalError,
    ObjectMissing,
    StoreDenied,
    StoreError,
    TorporError,
)
from torpor.snapshot.repository.fetching import open_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torpor.snapshot.repository.domain import Domain
    from torpor.store.interface import Store

GAP_BYTES: Final = 64 * 1024
_RETRY_S: Final = 0.2

log = logging.getLogger("torpor.pager")


class Priority(enum.IntEnum):
    """How urgent a chunk is."""

    DEMAND = 0
    WORKING_SET = 1
    HYDRATION = 2


_LONGEST_BYTES: Final = {
    Priority.DEMAND: 256 * 1024,  # a guest waits for the whole request
    Priority.WORKING_SET: 2 * 1024 * 1024,
    Priority.HYDRATION: 2 * 1024 * 1024,
}


class Chunk(NamedTuple):
    """A chunk in an object of a store, and the domain that opens it."""

    store: Store
    key: str
    offset: int
    length: int
    chunk_id: bytes
    domain: Domain

    @property
    def place(self) -> tuple[int, str, int, int, bytes]:
        """What tells one chunk from another."""
        return (id(self.store), self.key, self.offset, self.length, self.chunk_id)


@dataclass
class _Want:
    chunk: Chunk
    priority: Priority
    deadline_s: float
    done: threading.Event = field(default_factory=threading.Event)
    content: bytes | None = None
    error: TorporError | None = None
    trouble: StoreError | None = None
    taken: bool = False


@dataclass(frozen=True)
class FetchCounters:
    """Requests that brought something and their bytes, chunks that came, requests that failed."""

    requests: int
    bytes: int
    chunks: int
    failures: int


class Fetcher:
    """Worker threads over stores. `keep` is given each chunk that arrived, in a worker's thread.

    `trace` is told "fetching" before each request and "fetched" before what came is handed out.
    """

    def __init__(
        self,
        *,
        workers: int,
        deadline_s: float,
        keep: Callable[[bytes, bytes], None],
        trace: Callable[[str], None] = lambda place: None,
    ) -> None:
        self._deadline_s = deadline_s
        self._keep = keep
        self._trace = trace
        self._condition = threading.Condition()
        self._queues: dict[Priority, collections.deque[_Want]] = {
            priority: collections.deque() for priority in Priority
        }
        self._near: dict[tuple[int, str], dict[tuple[int, str, int, int, bytes], _Want]] = (
            collections.defaultdict(dict)
        )
        self._counts: collections.Counter[str] = collections.Counter()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def fetch(
        self, chunks: Iterable[Chunk], priority: Priority, *, beside: Iterable[Chunk] = ()
    ) -> dict[bytes, bytes]:
        """The content of chunks by id, verified; blocks until all are here.

        A chunk that is on its way already is waited for, made more urgent if this is. What lies
        `beside` them is not waited for: it comes with the same requests as far as those may grow,
        the rest when nothing is more urgent. Raises what kept a chunk from coming when the deadline
        is over (DeadlineExceeded naming the object), or at once what no repetition mends: Damaged,
        ObjectMissing, StoreDenied, Incompatible.
        """
        until_s = time.monotonic() + self._deadline_s
        wants = self.ask(chunks, priority, beside=beside)
        for want in wants:
            if not want.done.wait(max(0.0, until_s - time.monotonic())):
                raise self._too_late(want)
        found: dict[bytes, bytes] = {}
        for want in wants:
            if want.error is not None:
                raise want.error
            assert want.content is not None
            found[want.chunk.chunk_id] = want.content
        return found

    def ask(
        self, chunks: Iterable[Chunk], priority: Priority, *, beside: Iterable[Chunk] = ()
    ) -> list[_Want]:
        """Queue chunks without waiting for them; those `beside` them are not among the wants."""
        now_s = time.monotonic()
        with self._condition:
            wants = [self._ask(chunk, priority, now_s) for chunk in chunks]
            for chunk in beside:
                self._ask(chunk, Priority.HYDRATION, now_s)
            self._condition.notify(len(wants))
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
        """End the workers, each after the request that it is at; what still waits fails."""
        with self._condition:
            self._ended.set()
            for near in list(self._near.values()):
                for want in [want for want in near.values() if not want.taken]:
                    self._finish(want, _closed())
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _ask(self, chunk: Chunk, priority: Priority, now_s: float) -> _Want:
        near = self._near[chunk.place[:2]]
        want = near.get(chunk.place)
        if want is None:
            want = near[chunk.place] = _Want(chunk, priority, now_s + self._deadline_s)
            if self._ended.is_set():
                self._finish(want, _closed())
            self._queues[priority].append(want)
        elif priority < want.priority:
            want.priority = priority
            if not want.taken:  # it stays in its old queue too, where it is skipped
                self._queues[priority].append(want)
        want.deadline_s = now_s + self._deadline_s
        return want

    def _work(self) -> None:
        while True:
            with self._condition:
                while not (batch := self._next()):
                    if self._ended.is_set():
                        return
                    self._condition.wait()
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
        near = self._near[first.chunk.place[:2]]
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
        begin = batch[0].chunk.offset
        end = max(want.chunk.offset + want.chunk.length for want in batch)
        try:
            data = self._request(batch, begin, end - begin)
        except TorporError as error:
            for want in batch:
                self._settle(want, error)
            return
        except Exception as error:  # whoever waits must hear of it
            log.exception("a request failed key=%s", batch[0].chunk.key)
            for want in batch:
                self._settle(want, InternalError("fetching failed", reason=repr(error)))
            return
        if data is None:
            return
        self._trace("fetched")
        with self._condition:
            self._counts["requests"] += 1
            self._counts["bytes"] += len(data)
        for want in sorted(batch, key=lambda want: want.priority):  # what is waited for first
            place = want.chunk.offset - begin
            self._open(want, memoryview(data)[place : place + want.chunk.length])

    def _request(self, batch: list[_Want], begin: int, length: int) -> bytes | None:
        """The bytes, asked for until the deadline; None when the batch was given back."""
        first = batch[0].chunk
        while True:
            self._trace("fetching")
            try:
                return first.store.get_range(first.key, begin, length)
            except (ObjectMissing, StoreDenied):
                raise
            except StoreError as error:
                trouble = error
            with self._condition:
                self._counts["failures"] += 1
                for want in batch:
                    want.trouble = trouble
                if time.monotonic() > max(want.deadline_s for want in batch):
                    raise self._too_late(batch[0])
            if self._ended.wait(_RETRY_S):
                raise _closed()
            if self._give_back(batch):
                return None

    def _give_back(self, batch: list[_Want]) -> bool:
        """Queue a batch again if something more urgent waits; whether it did."""
        urgency = min(want.priority for want in batch)
        with self._condition:
            if not any(self._queues[priority] for priority in Priority if priority < urgency):
                return False
            for want in reversed(batch):
                want.taken = False
                self._queues[want.priority].appendleft(want)
            return True

    def _open(self, want: _Want, sealed: memoryview) -> None:
        chunk = want.chunk
        error: TorporError | None = None
        try:
            want.content = open_window(chunk.domain, chunk.chunk_id, sealed)
            self._keep(chunk.chunk_id, want.content)
        except Damaged as caught:
            error = Damaged(
                f"object {chunk.key} in the store is damaged",
                reason=f"{caught}, at offset {chunk.offset}",
            )
        except TorporError as caught:
            error = caught
        except Exception as caught:
            log.exception("a chunk could not be opened key=%s", chunk.key)
            error = InternalError("a chunk could not be opened", reason=repr(caught))
        self._settle(want, error)

    def _settle(self, want: _Want, error: TorporError | None) -> None:
        with self._condition:
            self._counts["chunks"] += error is None
            self._finish(want, error)

    def _finish(self, want: _Want, error: TorporError | None) -> None:
        """Forget a want and let who waits for it go on; the caller holds the lock."""
        object_place = want.chunk.place[:2]
        with contextlib.suppress(KeyError):
            del self._near[object_place][want.chunk.place]
        if not self._near[object_place]:
            del self._near[object_place]
        want.error = error
        want.done.set()

    def _too_late(self, want: _Want) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"object {want.chunk.key} could not be read within {self._deadline_s:g} s",
            reason=str(want.trouble or "the store has not answered"),
        )


def _closed() -> StoreError:
    return StoreError("the pager ends")
