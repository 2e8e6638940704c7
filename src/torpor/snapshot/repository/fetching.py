"""Fetching windows: ranged GETs over packs, chunks verified and opened, written where they go."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from torpor.errors import Damaged, Incompatible, ObjectMissing
from torpor.host.sparse import write_at
from torpor.host.threads import map_ordered
from torpor.snapshot.repository.chunks import decode
from torpor.snapshot.repository.records import damaged, within
from torpor.snapshot.windows import WINDOW_BYTES, window_length

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import Entry, FileMap
    from torpor.store.interface import Store

REQUEST_BYTES: Final = 4 * 1024 * 1024
GAP_BYTES: Final = 128 * 1024
_WORKERS: Final = 4


class Target(NamedTuple):
    """Where a chunk's content goes: an open file, a window of it, and its length there."""

    descriptor: int
    window: int
    length: int


@dataclass(slots=True)
class Wanted:
    """A chunk of an object and all the places that want it."""

    offset: int
    length: int
    chunk_id: bytes
    domain: Domain
    targets: list[Target] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """One ranged GET and the chunks in it."""

    key: str
    offset: int
    length: int
    chunks: tuple[Wanted, ...]


class Plan:
    """Chunks to fetch, by object; a chunk that several windows share is fetched once."""

    def __init__(self) -> None:
        self._wanted: dict[str, dict[int, Wanted]] = collections.defaultdict(dict)

    def want(self, key: str, entry: Entry, domain: Domain) -> Wanted:
        """Want a window's chunk. Raises Damaged when two maps disagree about a place."""
        place = entry.location
        known = self._wanted[key].get(place.offset)
        if known is None:
            known = self._wanted[key][place.offset] = Wanted(
                place.offset, place.length, entry.chunk_id, domain
            )
        if (known.length, known.chunk_id) != (place.length, entry.chunk_id):
            raise damaged(key, "two records disagree about a chunk in it")
        return known

    def add_file(
        self,
        entries: Iterable[Entry],
        key_of: Callable[[bytes], str],
        *,
        size_bytes: int,
        domain: Domain,
        descriptor: int,
    ) -> None:
        """Want windows of a file of `size_bytes`, written to its descriptor."""
        for entry in entries:
            length = window_length(entry.window, size_bytes)
            wanted = self.want(key_of(entry.location.pack), entry, domain)
            wanted.targets.append(Target(descriptor, entry.window, length))

    @property
    def chunks(self) -> int:
        """Chunks that are wanted."""
        return sum(len(chunks) for chunks in self._wanted.values())

    def ends(self) -> dict[str, int]:
        """How long each object must at least be."""
        return {
            key: max(wanted.offset + wanted.length for wanted in chunks.values())
            for key, chunks in self._wanted.items()
        }

    @property
    def stored_bytes(self) -> int:
        """Bytes of all wanted chunks."""
        return sum(w.length for chunks in self._wanted.values() for w in chunks.values())

    def requests(self) -> Iterator[Request]:
        """Ranges that cover the chunks: near ones together, none longer than REQUEST_BYTES."""
        for key, by_offset in self._wanted.items():
            pending: list[Wanted] = []
            for wanted in sorted(by_offset.values(), key=lambda wanted: wanted.offset):
                if pending and not _joins(pending, wanted):
                    yield _request(key, pending)
                    pending = []
                pending.append(wanted)
            if pending:
                yield _request(key, pending)


def fetch(
    store: Store, plan: Plan, *, arrived: Callable[[str, int], None], workers: int = _WORKERS
) -> None:
    """Fetch everything of a plan and write it. `arrived` is told of each range, in any thread.

    Raises Damaged, ObjectMissing or Incompatible (a newer encoding) naming the object; nothing
    unverified is ever written.
    """

    def work(request: Request) -> None:
        data = memoryview(read_request(store, request))
        for wanted in request.chunks:
            begin = wanted.offset - request.offset
            try:
                _place(wanted, data[begin : begin + wanted.length])
            except Damaged as error:
                raise damaged(request.key, f"{error}, at offset {wanted.offset}") from None
            except Incompatible as error:
                raise within(request.key, error) from None
        arrived(request.key, request.length)

    for _ in map_ordered(work, plan.requests(), workers=workers, ahead=workers):
        pass


def open_window(domain: Domain, chunk_id: bytes, sealed: bytes | memoryview) -> bytes:
    """A window's content, verified against its id. Raises Damaged, Incompatible."""
    content = decode(domain.open_chunk(chunk_id, sealed))
    if domain.chunk_id(content) != chunk_id:
        raise Damaged("a chunk has another content than its id says")
    return content


def _place(wanted: Wanted, sealed: memoryview) -> None:
    content = open_window(wanted.domain, wanted.chunk_id, sealed)
    for target in wanted.targets:
        if len(content) != target.length:
            raise Damaged(f"a chunk of {len(content)} bytes for a window of {target.length}")
        write_at(target.descriptor, content, target.window * WINDOW_BYTES)


def read_request(store: Store, request: Request) -> bytes:
    """The bytes of a request. Raises ObjectMissing, Damaged naming the object."""
    try:
        return store.get_range(request.key, request.offset, request.length)
    except ObjectMissing:
        raise ObjectMissing(
            f"the store has no object {request.key}",
            reason="the snapshot's record names it",
            hint="`torpor store check` lists what is missing; push the snapshot again",
        ) from None


def _joins(pending: list[Wanted], wanted: Wanted) -> bool:
    first, last = pending[0], pending[-1]
    gap = wanted.offset - (last.offset + last.length)
    return gap <= GAP_BYTES and wanted.offset + wanted.length - first.offset <= REQUEST_BYTES


def _request(key: str, chunks: list[Wanted]) -> Request:
    offset = chunks[0].offset
    end = max(wanted.offset + wanted.length for wanted in chunks)
    return Request(key, offset, end - offset, tuple(chunks))


def zero_windows_between(near: FileMap, wanted: FileMap) -> list[int]:
    """Windows that are zeros in `wanted` but not in `near`."""
    return [entry.window for entry in near if wanted.get(entry.window) is None]
