"""Collection: deleting what no ref needs, while pushes go on (docs/format.md, "Collection").

The order is what makes it safe. A push writes its lease, then reads what is condemned, and builds
on nothing of that. A collection condemns, then reads the leases: a push that is not among them
began later and sees the condemnation; those that are, it waits for. Then it marks again, and
deletes what is condemned and still unreachable. No object but a ref is ever written twice, so
nothing comes back under a condemned name. Ages are told by the store's clock alone.

Only one collection works at a time: when another one ends with a condemnation, pushes build again
on what it named, and what this one marked before is no longer true.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from torpor.errors import Conflict
from torpor.snapshot.repository.lease import LEASE_S, Lease
from torpor.snapshot.repository.reachable import mark
from torpor.snapshot.repository.records import CondemnedRecord, seal
from torpor.snapshot.repository.repository import new_id

if TYPE_CHECKING:
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.transfer import Progress
    from torpor.store.interface import Store

GRACE_S: Final = 7 * 24 * 3600.0

_ORDER: Final = ("snapshots/", "images/", "index/", "packs/")
"""What is deleted first: nothing that is left may point to something that is gone."""
_BATCH: Final = 500
LEASES: Final = "leases/"
COLLECTIONS: Final = "collections/"
CLOCK: Final = "clock/"
"""Where empty objects are put to learn the store's time."""


@dataclass(frozen=True)
class Collected:
    """What a collection did, or would do: objects and their bytes.

    `condemned` are unreachable and wait, for the grace period to pass or for `pushes` under way.
    """

    deleted: int
    deleted_bytes: int
    condemned: int
    condemned_bytes: int
    kept: int
    kept_bytes: int
    pushes: int
    dry_run: bool


def collect(
    repository: Repository,
    *,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    progress: Progress,
    lease_s: float = LEASE_S,
) -> Collected:
    """Condemn what is unreachable now, delete what was condemned `grace_s` ago and still is.

    Stopped at any point it has deleted nothing that is needed, and the next one goes on. With
    `dry_run` nothing is condemned or deleted. Raises DataError when a ref, or what it points to,
    cannot be read: what that needs is not known, so nothing may be deleted. Raises Conflict when
    another collection is under way, DeadlineExceeded when it could not say that it is.
    """
    collector = _Collector(repository, grace_s, lease_s, progress)
    if dry_run:
        return collector.run(dry_run=True)
    with Lease(repository, "collection", folder=COLLECTIONS) as lease:
        collector.refuse_company(lease)
        return collector.run(dry_run=False, lease=lease)


class _Condemnation(NamedTuple):
    key: str
    written_s: float
    keys: tuple[str, ...]
    leases: frozenset[str]


class _Collector:
    def __init__(
        self, repository: Repository, grace_s: float, lease_s: float, progress: Progress
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._grace_s = grace_s
        self._lease_s = lease_s
        self._progress = progress

    def refuse_company(self, lease: Lease) -> None:
        """Raise Conflict when another collection has a lease: of two, one at least sees it."""
        if self._live_leases(store_time(self._store), COLLECTIONS) - {lease.key}:
            raise Conflict(
                "another collection is under way in the store",
                reason=f"or one was killed less than {self._lease_s:.0f} s ago",
                hint="wait for it",
            )

    def run(self, *, dry_run: bool, lease: Lease | None = None) -> Collected:
        now_s = store_time(self._store)
        objects = {info.key: info for prefix in _ORDER for info in self._store.list(prefix)}
        needed = mark(self._repository).keys()
        known = self._condemnations(dry_run=dry_run)
        condemned = {key for condemnation in known for key in condemnation.keys}
        fresh = tuple(
            key
            for key, info in objects.items()
            if key not in needed
            and key not in condemned
            and now_s - info.last_modified >= min(self._grace_s, self._lease_s)
        )
        if fresh:
            known.append(self._condemn(fresh, now_s, dry_run=dry_run))
        live = self._live_leases(now_s)
        ripe = [c for c in known if now_s - c.written_s >= self._grace_s and not c.leases & live]
        if ripe and not dry_run:
            needed = mark(self._repository).keys()  # pushes that were waited for have ended since
        unneeded = {key for c in known for key in c.keys if key in objects and key not in needed}
        doomed = {key for c in ripe for key in c.keys} & unneeded
        if lease is not None:
            self._delete({key: objects[key].size_bytes for key in doomed}, lease)
            self._store.delete_many([condemnation.key for condemnation in ripe])
            self._sweep(now_s)
        sizes = {key: info.size_bytes for key, info in objects.items()}
        kept = sizes.keys() - unneeded
        return Collected(
            deleted=len(doomed),
            deleted_bytes=sum(sizes[key] for key in doomed),
            condemned=len(unneeded - doomed),
            condemned_bytes=sum(sizes[key] for key in unneeded - doomed),
            kept=len(kept),
            kept_bytes=sum(sizes[key] for key in kept),
            pushes=len(live),
            dry_run=dry_run,
        )

    def _condemn(self, keys: tuple[str, ...], now_s: float, *, dry_run: bool) -> _Condemnation:
        key = f"condemned/{new_id().hex()}"
        if not dry_run:
            self._put(key, keys, None)
        return self._settle(key, keys, now_s, dry_run=dry_run)

    def _settle(
        self, key: str, keys: tuple[str, ...], written_s: float, *, dry_run: bool
    ) -> _Condemnation:
        """Note which pushes may not have seen a condemnation that can be read by now."""
        leases = self._live_leases(store_time(self._store))
        if not dry_run:
            self._put(key, keys, tuple(sorted(leases)))
        return _Condemnation(key, written_s, keys, leases)

    def _put(self, key: str, keys: tuple[str, ...], leases: tuple[str, ...] | None) -> None:
        record = CondemnedRecord(keys=keys, leases=leases)
        self._store.put(key, seal(self._repository.domain, key, record))

    def _condemnations(self, *, dry_run: bool) -> list[_Condemnation]:
        found = []
        for info in list(self._store.list("condemned/")):
            record = self._repository.read_condemned(info.key)
            if record is None:  # another collection has ended with it
                continue
            if record.leases is None:  # the collection that wrote it died there
                found.append(
                    self._settle(info.key, record.keys, info.last_modified, dry_run=dry_run)
                )
            else:
                leases = frozenset(record.leases)
                found.append(_Condemnation(info.key, info.last_modified, record.keys, leases))
        return found

    def _live_leases(self, now_s: float, folder: str = LEASES) -> frozenset[str]:
        return frozenset(
            info.key
            for info in self._store.list(folder)
            if now_s - info.last_modified <= self._lease_s
        )

    def _delete(self, doomed: dict[str, int], lease: Lease) -> None:
        done, total = 0, sum(doomed.values())
        for prefix in _ORDER:
            keys = sorted(key for key in doomed if key.startswith(prefix))
            for begin in range(0, len(keys), _BATCH):
                lease.check()
                batch = keys[begin : begin + _BATCH]
                self._store.delete_many(batch)
                done += sum(doomed[key] for key in batch)
                self._progress.step("deleted", done, total)

    def _sweep(self, now_s: float) -> None:
        """Remove what dead pushes and dead collections left of their own signs, and unfinished.

        A push without a lease makes nothing of what it was writing any more.
        """
        for prefix in (LEASES, COLLECTIONS, CLOCK):
            stale = [
                info.key
                for info in self._store.list(prefix)
                if now_s - info.last_modified > self._lease_s
            ]
            self._store.delete_many(stale)
        self._store.delete_leftovers(older_than_s=max(self._grace_s, self._lease_s))


def store_time(store: Store) -> float:
    """Seconds since 1970 by the store's clock: the time of an object that is written for it.

    S3 stamps an object when its upload begins, so this is not later than now.
    """
    key = f"{CLOCK}{new_id().hex()}"
    store.put(key, b"")
    try:
        return store.head(key).last_modified
    finally:
        store.delete(key)
