"""Each request of a push and of a pull fails in every way, one at a time.

The call finishes or fails cleanly: the error says what the store did, no lease, no staging
directory, no thread and no descriptor is left. The same call again succeeds with the right bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.exchange import Exchange, TestNode, assert_same
from fixtures.memory import RAM
from torpor.config import Settings
from torpor.errors import DataError, ObjectMissing, StoreError, StoreUnreachable, TorporError
from torpor.snapshot.repository.pushing import PushOptions
from torpor.store.faults import Fault, FaultKind, Faults
from torpor.store.plain import open_plain
from torpor.store.stack import wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.store.faults import Call
    from torpor.store.interface import Store

pytestmark = pytest.mark.slow

PASSING: tuple[FaultKind, ...] = ("timeout", "error", "lost answer", "cut off")
"""What a repeat gets over: no answer, 503, an answer lost after the effect, a reset in mid-body."""

LIES: tuple[FaultKind, ...] = ("truncate", "flip")
"""Short reads and wrong bytes that the store gives as if they were right."""


class NoWaiting:
    """A clock that is past every wait at once."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        """See Clock."""
        return self._now_s

    def wait(self, seconds: float) -> None:
        """See Clock."""
        self._now_s += seconds


class Bench:
    """A fresh store in memory, with faults, for each trial of one exchange."""

    def __init__(self, made: Exchange) -> None:
        self._made = made
        self._nodes = itertools.count()

    def fresh(self, *, prepared: bool) -> tuple[Exchange, Faults]:
        """A repository that is empty, or where the base was pushed; its faults begin now."""
        plain = open_plain(Settings(), "memory://")
        if prepared:
            self._made.with_store(plain).push(self._made.base, ref="base")
        return self.over(plain)

    def over(self, plain: Store, *faults: Fault) -> tuple[Exchange, Faults]:
        """The same store seen through faults."""
        faulty = Faults(plain, *faults)
        return self._made.with_store(faulty), faulty

    def node(self) -> TestNode:
        """A node that has nothing."""
        return TestNode(self._made.directory / f"node-{next(self._nodes)}")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """Nodes in memory; packs of a size that gives several of each kind of object."""
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        options = PushOptions(pack_bytes=512 * 1024, workers=2)
        yield Bench(Exchange(Path(directory), open_plain(Settings(), "memory://"), options=options))


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No thread and no descriptor more after the body than before."""
    threads, descriptors = threading.active_count(), _descriptors()
    yield
    assert threading.active_count() == threads
    assert _descriptors() == descriptors


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def attempt(work: Any) -> TorporError | None:  # noqa: ANN401
    """The error of a push or pull, without what its traceback keeps alive."""
    with nothing_left():
        try:
            work()
        except (StoreError, DataError) as error:
            return error.with_traceback(None)
    return None


def leases(exchange: Exchange, calls: tuple[Call, ...]) -> list[str]:
    """Leases that are left though the store did not fail the request that was to delete them."""
    hit = {call.key for call in calls if call.operation == "delete" and call.fault}
    return [i.key for i in exchange.store.list("leases/") if i.key not in hit]


def _calls_of_push(bench: Bench, *, prepared: bool) -> int:
    exchange, faults = bench.fresh(prepared=prepared)
    exchange.push()
    return len(faults.calls)


@pytest.mark.parametrize("prepared", [False, True], ids=["empty", "base is there"])
@pytest.mark.parametrize("kind", [*PASSING, *LIES])
def test_push(bench: Bench, kind: FaultKind, prepared: bool) -> None:
    """A push without repeats survives any one fault or says which; pushed again all is there."""
    hits = 0
    for number in range(_calls_of_push(bench, prepared=prepared)):
        exchange, faults = bench.fresh(prepared=prepared)
        faults.inject(Fault("any", kind, after=number))
        error = attempt(exchange.push)
        hit = [call for call in faults.calls if call.fault]
        hits += len(hit)
        if kind in PASSING and error is not None:
            assert isinstance(error, StoreUnreachable)
            assert hit[0].key in str(error)
        faults.heal()
        assert leases(exchange, faults.calls) == []
        exchange.push()
        node = bench.node()
        assert_same(exchange.pull(node=node), exchange.function)
    assert hits


@pytest.mark.parametrize("kind", PASSING)
def test_push_with_repeats(bench: Bench, kind: FaultKind) -> None:
    """With the repeats of the real stack no fault in passing is seen at all."""
    for number in range(_calls_of_push(bench, prepared=False)):
        plain = open_plain(Settings(), "memory://")
        exchange, faults = bench.over(plain, Fault("any", kind, after=number))
        settings = Settings()
        stacked = exchange.with_store(wrap(faults, settings, clock=NoWaiting()))
        with nothing_left():
            stacked.push()
        assert [call.fault for call in faults.calls if call.fault] == [kind]
        assert list(plain.list("leases/")) == []
        assert_same(exchange.pull(node=bench.node()), exchange.function)


@pytest.mark.parametrize("near", [False, True], ids=["empty node", "parent is there"])
@pytest.mark.parametrize("kind", [*PASSING, *LIES])
def test_pull(bench: Bench, kind: FaultKind, near: bool) -> None:
    """A pull without repeats survives any one fault or says which; pulled again all is right."""
    exchange, faults = bench.fresh(prepared=False)
    exchange.push()
    exchange.push(exchange.instance, ref="g")

    def prepare() -> TestNode:
        node = bench.node()
        if near:
            exchange.pull(node=node)
        return node

    node = prepare()
    before = len(faults.calls)
    exchange.pull("g", node=node)
    for number in range(len(faults.calls) - before):
        node = prepare()
        there = node.left_over()
        faults.inject(Fault("any", kind, after=number))
        error = attempt(lambda node=node: exchange.pull("g", node=node))
        faults.heal()
        if error is None:
            assert_same(node.snapshots.get(exchange.instance.digest), exchange.instance)
            continue
        right = StoreUnreachable if kind in PASSING else (DataError, ObjectMissing)
        assert isinstance(error, right)
        assert node.left_over() == there
        assert_same(exchange.pull("g", node=node), exchange.instance)


@pytest.mark.parametrize("kind", PASSING)
def test_pull_with_repeats(bench: Bench, kind: FaultKind) -> None:
    """With the repeats of the real stack every other request may fail in passing."""
    plain = open_plain(Settings(), "memory://")
    exchange, _ = bench.over(plain)
    exchange.push()
    plan = [Fault("any", kind, after=2 * number) for number in range(100)]
    stacked, faults = bench.over(plain, *plan)
    stacked = exchange.with_store(wrap(faults, Settings(), clock=NoWaiting()))
    assert_same(stacked.pull(node=bench.node()), exchange.function)
    assert [call.fault for call in faults.calls][:6] == [kind, "", kind, "", kind, ""]


@pytest.mark.parametrize(
    ("kind", "error"),
    [("denied", "denied"), ("failure", "made to fail"), ("error", "made to fail")],
)
def test_the_store_is_gone(bench: Bench, kind: FaultKind, error: str) -> None:
    """From any request on the store fails for good: push and pull say so, and pull leaves nothing.

    What a push left is found again by the next one, which sends only what had not arrived.
    """
    exchange, _ = bench.fresh(prepared=False)
    exchange.push()
    whole = _indexed_bytes(exchange.store)
    for number in range(_calls_of_push(bench, prepared=False)):
        exchange, faults = bench.fresh(prepared=False)
        faults.inject(Fault("any", kind, after=number, times=None))
        failed = attempt(exchange.push)
        assert isinstance(failed, StoreError) or number == len(faults.calls) - 1
        assert failed is None or error in str(failed)
        faults.heal()
        arrived = _indexed_bytes(exchange.store)
        sent = sum(n for key, n in exchange.push().objects.items() if key.startswith("packs/"))
        assert sent <= whole - arrived + 100
        assert_same(exchange.pull(node=bench.node()), exchange.function)


def _indexed_bytes(store: Store) -> int:
    """Bytes in packs that arrived together with their index."""
    indexes = {info.key.removeprefix("index/") for info in store.list("index/")}
    packs = store.list("packs/")
    return sum(i.size_bytes for i in packs if i.key.removeprefix("packs/") in indexes)


def test_missing_while_it_is_read(bench: Bench) -> None:
    """An object that vanishes between two requests is missing by its name, and nothing is left."""
    exchange, faults = bench.fresh(prepared=False)
    exchange.push()
    before = len(faults.calls)
    exchange.pull(node=bench.node())
    for number, call in enumerate(faults.calls[before:]):
        if number == 0 or call.operation == "list":
            continue
        node = bench.node()
        faults.inject(Fault("any", "missing", after=number))
        error = attempt(lambda node=node: exchange.pull(node=node))
        faults.heal()
        assert isinstance(error, ObjectMissing)
        assert node.left_over() == []
