"""Collections delete what no ref needs, and never what a ref or a push under way needs."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import Quiet, assert_same, make_key, pages
from fixtures.hooked_store import HookedStore
from torpor.config import Settings
from torpor.errors import Conflict, Damaged, DeadlineExceeded, KeyMissing, NotFound, ObjectMissing
from torpor.snapshot.repository.check import check
from torpor.snapshot.repository.gc import Collected, collect
from torpor.snapshot.repository.lease import GIVE_UP_S, Lease
from torpor.snapshot.repository.repository import Repository
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fixtures.exchange import Exchange
    from torpor.snapshot.local import LocalSnapshot

pytestmark = pytest.mark.slow

MOST_REQUESTS = 200


class Killed(BaseException):
    """The process ends here."""


def collect_now(exchange: Exchange, *, dry_run: bool = False, **times: float) -> Collected:
    """A collection without a grace period."""
    return collect(
        exchange.repository,
        grace_s=times.pop("grace_s", 0),
        dry_run=dry_run,
        progress=Quiet(),
        **times,
    )


def keys(exchange: Exchange) -> set[str]:
    """The names of all objects."""
    return {info.key for info in exchange.store.list("")}


def assert_sound(exchange: Exchange, snapshot: LocalSnapshot, ref: str) -> None:
    """Every byte that a ref needs is there, and a fresh pull is right."""
    checked = check(exchange.repository, progress=Quiet(), read_data=True)
    assert checked.problems == []
    repository = exchange.repository
    stored = repository.read_ref(ref)
    assert stored is not None
    assert stored.record.snapshot == snapshot.digest


def sibling(exchange: Exchange) -> LocalSnapshot:
    """Another function on the same base and with the same app, nearly equal to the first."""
    return exchange.a.make_child(
        exchange.base, exchange.app, memory=pages(3, (1, 4, 90)), name="s", seed=20
    )


def test_needed_objects_stay(exchange: Exchange) -> None:
    """What refs need is kept, what only a deleted ref needed goes, shared chunks stay."""
    exchange.push()
    exchange.push(exchange.instance, ref="g")
    assert collect_now(exchange).deleted == 0
    exchange.repository.delete_ref("f")
    collected = collect_now(exchange)
    assert collected.deleted > 0
    assert_sound(exchange, exchange.instance, "g")
    assert_same(exchange.pull("g"), exchange.instance)


def test_everything_goes_with_the_last_ref(exchange: Exchange) -> None:
    """Without any ref nothing is left, neither data nor signs of pushes and collections."""
    exchange.push()
    exchange.repository.delete_ref("f")
    collected = collect_now(exchange)
    assert collected.deleted_bytes > 0
    assert keys(exchange) == set()


def test_unknown_ref_is_not_deleted(exchange: Exchange) -> None:
    """Deleting a ref that is not there says so."""
    with pytest.raises(NotFound):
        exchange.repository.delete_ref("f")


def test_grace(exchange: Exchange) -> None:
    """What became unreachable is condemned at first, and deleted when the grace is over."""
    exchange.push()
    exchange.repository.delete_ref("f")
    first = collect_now(exchange, grace_s=3600, lease_s=0)
    assert (first.deleted, first.condemned > 0) == (0, True)
    again = collect_now(exchange, grace_s=3600, lease_s=0)
    assert (again.deleted, again.condemned) == (0, first.condemned)
    assert collect_now(exchange).deleted == first.condemned
    assert keys(exchange) == set()


def test_killed_writers_to_a_directory(exchange: Exchange, tmp_path: Path) -> None:
    """What they left in a file store goes once it is older than the grace and any lease."""
    there = exchange.with_store(open_store(Settings(store=f"file://{tmp_path}/store")))
    there.push()
    left = tmp_path / "store" / "packs" / "f00d#1"
    left.write_bytes(b"half")
    collect_now(there)  # a push may be at it still
    assert left.exists()
    hours_ago = time.time() - 2 * 3600
    os.utime(left, (hours_ago, hours_ago))
    collect_now(there, grace_s=3 * 3600)
    collect_now(there, dry_run=True)
    assert left.exists()
    collect_now(there, grace_s=3600)
    assert not left.exists()
    assert_sound(there, there.function, "f")


def test_dry_run_changes_nothing(exchange: Exchange) -> None:
    """--dry-run tells what would be deleted, and every object is as it was."""
    exchange.push()
    exchange.repository.delete_ref("f")
    before = keys(exchange)
    told = collect_now(exchange, dry_run=True)
    assert keys(exchange) == before
    assert told.deleted == collect_now(exchange).deleted > 0


def test_condemned_objects_are_not_built_upon(exchange: Exchange) -> None:
    """A push that begins after a condemnation sends all again; the deletion costs it nothing."""
    exchange.push()
    exchange.repository.delete_ref("f")
    doomed = keys(exchange)
    collect_now(exchange, grace_s=3600, lease_s=0)
    exchange.push()
    collect_now(exchange)
    assert doomed & keys(exchange) == set()
    assert_sound(exchange, exchange.function, "f")


def test_reached_again_is_spared(exchange: Exchange) -> None:
    """What a push that began before the condemnation took over is not deleted."""
    exchange.push()
    exchange.repository.delete_ref("f")

    def before(number: int, operation: str, key: str) -> None:
        if key.startswith("refs/") and operation == "put":
            collected = collect_now(exchange)
            assert (collected.deleted, collected.pushes) == (0, 1)
            assert collected.condemned > 0

    exchange.with_store(HookedStore(exchange.store, before)).push()
    assert collect_now(exchange).deleted == 0
    assert_sound(exchange, exchange.function, "f")


def push_with(
    exchange: Exchange, snapshot: LocalSnapshot, before: Callable[[int, str, str], None]
) -> int:
    """A push through a hook; how many requests it made."""
    store = HookedStore(exchange.store, before)
    exchange.with_store(store).push(snapshot, ref="s")
    return len(store.requests)


def test_collection_before_every_request_of_a_push(exchange: Exchange) -> None:
    """Wherever a collection runs, what the push then points to is whole.

    The push finds its siblings' chunks unreachable, so that everything it builds on is garbage.
    """
    wanted = sibling(exchange)
    number = total = 0
    while number <= total:
        exchange.push()
        exchange.repository.delete_ref("f")

        def before(seen: int, operation: str, key: str, at: int = number) -> None:
            if seen == at:
                collect_now(exchange)

        total = push_with(exchange, wanted, before) - 1
        collect_now(exchange)
        assert_sound(exchange, wanted, "s")
        exchange.repository.delete_ref("s")
        number += 1
    assert 10 < number < MOST_REQUESTS


def test_two_collections_in_a_push(exchange: Exchange) -> None:
    """One collection condemns early in a push, another comes at every later request of it."""
    wanted = sibling(exchange)
    number = total = 0
    while number <= total:
        exchange.push()
        exchange.repository.delete_ref("f")

        def before(seen: int, operation: str, key: str, at: int = number) -> None:
            if seen in (at, at + 1, at + 4):
                collect_now(exchange)

        total = push_with(exchange, wanted, before) - 1
        collect_now(exchange)
        assert_sound(exchange, wanted, "s")
        exchange.repository.delete_ref("s")
        number += 3


def test_push_before_every_request_of_a_collection(exchange: Exchange) -> None:
    """Wherever a push comes in a collection, what it points to is whole after the next one."""
    wanted = sibling(exchange)
    number = total = 0
    while number <= total:
        exchange.push()
        exchange.repository.delete_ref("f")

        def before(seen: int, operation: str, key: str, at: int = number) -> None:
            if seen == at:
                exchange.push(wanted, ref="s")

        store = HookedStore(exchange.store, before)
        collect(Repository(store, exchange.keyring), grace_s=0, progress=Quiet())
        total = len(store.requests) - 1
        if exchange.repository.read_ref("s") is None:
            break
        assert_sound(exchange, wanted, "s")
        collect_now(exchange)
        assert_sound(exchange, wanted, "s")
        exchange.repository.delete_ref("s")
        number += 1
    assert 8 < number < MOST_REQUESTS


def test_killed_push_is_collected(exchange: Exchange) -> None:
    """Killed at any request, a push leaves objects that a later collection removes."""
    wanted = exchange.function
    number = 0
    while number < MOST_REQUESTS:

        def before(seen: int, operation: str, key: str, at: int = number) -> None:
            if seen >= at:
                raise Killed

        store = HookedStore(exchange.store, before)
        try:
            exchange.with_store(store).push(wanted)
        except Killed:
            pass
        else:
            break
        if exchange.repository.read_ref("f") is not None:  # killed after all was done
            assert_sound(exchange, wanted, "f")
            exchange.repository.delete_ref("f")
        collect_now(exchange, lease_s=0)
        assert keys(exchange) == set()
        number += 1
    assert number > 10


def test_killed_collection_goes_on(exchange: Exchange) -> None:
    """Killed at any request, a collection has deleted nothing needed; the next one ends it."""
    number = 0
    while number < MOST_REQUESTS:
        exchange.push()
        exchange.push(sibling(exchange), ref="s")
        exchange.repository.delete_ref("f")

        def before(seen: int, operation: str, key: str, at: int = number) -> None:
            if seen >= at:
                raise Killed

        store = HookedStore(exchange.store, before)
        try:
            collect(Repository(store, exchange.keyring), grace_s=0, progress=Quiet())
        except Killed:
            pass
        else:
            break
        assert_sound(exchange, sibling(exchange), "s")
        collect_now(exchange, lease_s=0)
        assert_sound(exchange, sibling(exchange), "s")
        left = collect_now(exchange, lease_s=0)
        assert (left.deleted, left.condemned) == (0, 0)
        assert not any(
            key.startswith(("condemned/", "clock/", "collections/")) for key in keys(exchange)
        )
        number += 1
    assert number > 8


def test_collection_before_every_request_of_a_collection(exchange: Exchange) -> None:
    """Of two collections one works, or none; told apart, and nothing is left of either."""
    exchange.push()
    exchange.push(sibling(exchange), ref="s")
    number = total = refused = 0
    while number <= total:
        exchange.push()
        exchange.repository.delete_ref("f")
        other: list[bool] = []

        def before(
            seen: int, operation: str, key: str, at: int = number, done: list[bool] = other
        ) -> None:
            if seen == at:
                try:
                    collect_now(exchange)
                    done.append(True)
                except Conflict:
                    done.append(False)

        store = HookedStore(exchange.store, before)
        try:
            collect(Repository(store, exchange.keyring), grace_s=0, progress=Quiet())
        except Conflict:
            assert other == [False]
        total = max(total, len(store.requests) - 1)
        refused += other == [False]
        assert_sound(exchange, sibling(exchange), "s")
        number += 2
    assert refused > 3
    collect_now(exchange)
    assert not any(key.startswith(("condemned/", "collections/")) for key in keys(exchange))


def test_lease_that_was_dead_is_lost(exchange: Exchange) -> None:
    """Renewed after too long a silence, as by a machine that slept, a lease is no good any more."""
    now_s = [0.0]
    writes = threading.Semaphore(0)

    def before(number: int, operation: str, key: str) -> None:
        if operation == "put":
            writes.release()

    store = HookedStore(exchange.store, before)
    repository = Repository(store, exchange.keyring)
    with Lease(repository, "push", beat_s=0.001, clock=lambda: now_s[0]) as lease:
        lease.check()
        now_s[0] = GIVE_UP_S + 1
        while writes.acquire(blocking=False):
            pass
        for _ in range(3):  # of these the second began and ended after the jump
            writes.acquire()
        with pytest.raises(DeadlineExceeded, match="push could not renew"):
            lease.check()


def test_foreign_objects_are_no_refs(exchange: Exchange) -> None:
    """What lies among the refs under a name that no ref can have is nobody's business."""
    exchange.push()
    exchange.store.put("refs/No.Ref", b"?")
    exchange.store.put("refs/deeper/f", b"?")
    assert exchange.repository.refs() == ["f"]
    assert collect_now(exchange).deleted == 0


def test_unreadable_refs_stop_a_collection(exchange: Exchange) -> None:
    """What a ref of another key or a damaged record needs is not known: nothing is deleted."""
    exchange.push()
    exchange.push(sibling(exchange), ref="s")
    exchange.repository.delete_ref("f")
    before = keys(exchange)
    with pytest.raises(KeyMissing, match="refs/s"):
        collect(Repository(exchange.store, make_key()), grace_s=0, progress=Quiet())
    ref = exchange.repository.read_ref("s")
    assert ref is not None
    whole, _ = exchange.store.get(ref.record.manifest.key, limit_bytes=1 << 30)
    exchange.store.put(ref.record.manifest.key, whole[:-1])
    with pytest.raises(Damaged, match="manifest"):
        collect_now(exchange)
    exchange.store.delete(ref.record.manifest.key)
    with pytest.raises(ObjectMissing, match="manifest"):
        collect_now(exchange)
    assert before - keys(exchange) == {ref.record.manifest.key}
