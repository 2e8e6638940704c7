"""Check: is every byte there that the refs of a repository need, and is it right?"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torpor.errors import Damaged, DataError, ObjectMissing, TorporError
from torpor.host.threads import map_ordered
from torpor.snapshot.repository.fetching import Plan, open_window, read_request
from torpor.snapshot.repository.known import locate
from torpor.snapshot.repository.reachable import mark
from torpor.snapshot.repository.records import LIMITS, IndexRecord, Kind, unseal
from torpor.snapshot.repository.repository import index_key, pack_key
from torpor.snapshot.repository.stored import ref_key
from torpor.snapshot.repository.working_set import touched_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.fetching import Request
    from torpor.snapshot.repository.filemap import Entry, FileMap
    from torpor.snapshot.repository.reachable import Reachable
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stored import StoredSnapshot
    from torpor.snapshot.transfer import Progress

_WORKERS: Final = 4


@dataclass(frozen=True)
class Problem:
    """An object that is not as it should be, and how."""

    key: str
    reason: str


@dataclass
class Checked:
    """What was looked at, and every problem that was found, by object name.

    `read_bytes` is the content that was read and verified, 0 unless data was read.
    """

    refs: int = 0
    snapshots: int = 0
    images: int = 0
    packs: int = 0
    chunks: int = 0
    read_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def check(
    repository: Repository,
    *,
    progress: Progress,
    read_data: bool = False,
    refs: Sequence[str] | None = None,
) -> Checked:
    """Look at every object that `refs` (default: all) need; with `read_data` open every chunk.

    Without it each record is read and verified, and each pack compared by its length. Raises
    NotFound for a ref that is not there, StoreError; all else is a problem in the result.
    """
    return _Checker(repository, progress).run(refs, read_data=read_data)


class _Checker:
    def __init__(self, repository: Repository, progress: Progress) -> None:
        self._repository = repository
        self._progress = progress
        self._found = Checked()

    def run(self, refs: Sequence[str] | None, *, read_data: bool) -> Checked:
        for name in refs or ():
            self._repository.resolve(name)
        needed = mark(self._repository, refs=refs, problem=self._problem)
        self._found.refs = len(needed.refs)
        self._found.snapshots = len(needed.snapshots)
        self._found.images = len(needed.images)
        self._found.packs = len(needed.packs)
        plan = self._plan(needed)
        self._found.chunks = plan.chunks
        self._packs(needed, plan)
        if read_data:
            self._read(plan)
        self._found.problems.sort(key=lambda problem: (problem.key, problem.reason))
        return self._found

    def _problem(self, key: str, error: TorporError) -> None:
        self._found.problems.append(Problem(key, str(error)))

    def _attempt(self, key: str, work: Callable[[], None]) -> None:
        try:
            work()
        except (DataError, ObjectMissing) as error:
            self._problem(key, error)

    def _plan(self, needed: Reachable) -> Plan:
        """Every chunk that something needs, those in wake objects too."""
        plan = Plan()
        for snapshot in needed.snapshots.values():
            for file in (snapshot.memory, snapshot.disk):
                self._want(plan, file, snapshot.domain)
            self._attempt(snapshot.wake.key, functools.partial(self._wake, plan, snapshot))
        for image in needed.images.values():
            self._want(plan, image.content, image.domain)
        for name, ref in needed.refs.items():
            pointed = needed.snapshots.get(ref.record.manifest.key)
            if pointed is not None and pointed.wake != ref.record.wake:
                self._problem(ref_key(name), Damaged("it names another wake object"))
        return plan

    def _want(self, plan: Plan, file: FileMap, domain: Domain) -> None:
        for entry in file:
            key = pack_key(entry.location.pack)
            self._attempt(key, functools.partial(_want_one, plan, key, entry, domain))

    def _wake(self, plan: Plan, snapshot: StoredSnapshot) -> None:
        link = snapshot.wake
        wake = self._repository.read_wake(link)
        touched_windows(wake, snapshot)  # as who pulls it does
        if self._repository.store.head(link.key).size_bytes != link.size_bytes:
            raise Damaged("it has another length")
        for file in wake.files.values():
            for entry in file:
                plan.want(link.key, entry, wake.domain)

    def _packs(self, needed: Reachable, plan: Plan) -> None:
        """Every pack is there and long enough; its index, if sound, describes it."""
        sizes = {info.key: info.size_bytes for info in self._repository.store.list("packs/")}
        ends = plan.ends()
        for pack in needed.packs:
            key = pack_key(pack)
            if key not in sizes:
                self._problem(key, ObjectMissing("it is not there"))
            elif sizes[key] < ends.get(key, 0):
                self._problem(key, Damaged(f"it has {sizes[key]} bytes, {ends[key]} are needed"))
        work = functools.partial(self._index, sizes)
        for _ in map_ordered(work, needed.packs, workers=_WORKERS, ahead=2 * _WORKERS):
            pass

    def _index(self, sizes: dict[str, int], pack: bytes) -> None:
        """An index is no reader's business, but without it later pushes send chunks again."""
        key = index_key(pack)

        def work() -> None:
            data, _ = self._repository.store.get(key, limit_bytes=LIMITS[Kind.INDEX] + 1024)
            record, _ = unseal(self._repository.keyring, key, data, IndexRecord)
            if pack_key(pack) in sizes:
                for _ in locate(record, sizes[pack_key(pack)]):
                    pass

        self._attempt(key, work)

    def _read(self, plan: Plan) -> None:
        total, done = plan.stored_bytes, 0
        lock = threading.Lock()
        self._progress.step("data", 0, total)

        def work(request: Request) -> None:
            nonlocal done
            self._attempt(request.key, lambda: self._open(request))
            with lock:
                done += request.length
                self._progress.step("data", min(done, total), total)

        for _ in map_ordered(work, plan.requests(), workers=_WORKERS, ahead=_WORKERS):
            pass

    def _open(self, request: Request) -> None:
        data = memoryview(read_request(self._repository.store, request))
        for wanted in request.chunks:
            begin = wanted.offset - request.offset
            try:
                open_window(wanted.domain, wanted.chunk_id, data[begin : begin + wanted.length])
            except Damaged as error:
                self._problem(request.key, Damaged(f"{error}, at offset {wanted.offset}"))
            else:
                self._found.read_bytes += wanted.length


def _want_one(plan: Plan, key: str, entry: Entry, domain: Domain) -> None:
    plan.want(key, entry, domain)
