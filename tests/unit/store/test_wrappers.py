"""Limit, Metrics, Faults and the stack that is made of them."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import pytest

from torpor.config import Settings
from torpor.errors import Damaged, InvalidInput, ObjectMissing, StoreUnreachable
from torpor.host.cancel import in_thread
from torpor.store.faults import Call, Fault, Faults
from torpor.store.limit import Limit
from torpor.store.metrics import Counters, Metrics
from torpor.store.plain import open_plain
from torpor.store.stack import wrap


def memory() -> Faults:
    """An empty store in memory that can be made to fail."""
    return Faults(open_plain(Settings(), "memory://"))


class Crowd:
    """A fault's action that holds requests in the store and knows how many are there."""

    def __init__(self, expected: int) -> None:
        self.full = threading.Event()
        self.open = threading.Event()
        self.most = self._now = 0
        self._expected = expected
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Called for each request in it."""
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            if self._now == self._expected:
                self.full.set()
        assert self.open.wait(60)
        with self._lock:
            self._now -= 1


def test_only_so_many_at_a_time() -> None:
    """Of many requests as many as allowed run together, never more, and all finish."""
    faults, crowd = memory(), Crowd(3)
    faults.inject(Fault("put", "do", times=None, action=crowd.enter))
    store = Limit(faults, concurrency=3)
    with ThreadPoolExecutor(10) as executor:
        done = [executor.submit(store.put, f"k/{number}", b"") for number in range(10)]
        assert crowd.full.wait(60)
        assert len(faults.calls) == 3
        crowd.open.set()
        for future in done:
            future.result()
    assert crowd.most == 3
    assert len(list(store.list("k/"))) == 10


def test_a_place_is_given_back_on_failure() -> None:
    """Requests that fail do not use the limit up."""
    faults = memory()
    faults.inject(Fault("head", "error", times=5))
    store = Limit(faults, concurrency=1)
    for _ in range(5):
        with pytest.raises(StoreUnreachable):
            store.head("a")
    with pytest.raises(ObjectMissing):
        store.head("a")


async def test_cancelled_while_it_waits_for_a_place() -> None:
    """A caller that is cancelled while others use all places is not kept until they end."""

    class Watched(threading.BoundedSemaphore):
        """Tells when somebody has waited in vain."""

        refused = threading.Event()

        def acquire(self, *arguments: object, **named: object) -> bool:
            got = super().acquire(*arguments, **named)  # type: ignore[arg-type]
            if not got:
                self.refused.set()
            return got

    faults, crowd = memory(), Crowd(1)
    faults.inject(Fault("put", "do", action=crowd.enter))
    store = Limit(faults, concurrency=1)
    store._places = Watched(1)
    first = asyncio.ensure_future(in_thread(store.put, "a", b""))
    await asyncio.to_thread(crowd.full.wait)
    second = asyncio.ensure_future(in_thread(store.put, "b", b""))
    await asyncio.to_thread(Watched.refused.wait)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    crowd.open.set()
    await first
    assert [call.key for call in faults.calls] == ["a"]


def test_no_place_at_all() -> None:
    """A limit of nothing is refused when the store is made."""
    with pytest.raises(InvalidInput):
        Limit(memory(), concurrency=0)


def test_what_is_counted() -> None:
    """Requests by operation, bytes of those that succeeded, errors by class."""
    counters = Counters()
    store = Metrics(memory(), counters)
    store.put("a", b"12345")
    store.put_stream("b", iter((b"123", b"4")))
    store.get("a", limit_bytes=9)
    store.get_range("b", 1, 2)
    store.get_prefix("a", 3)
    store.head("a")
    list(store.list(""))
    before = counters.snapshot()
    store.delete("a")
    store.delete_many(["b", "c"])
    for failing in (lambda: store.get("a", limit_bytes=1), lambda: store.get_range("a", 0, 9)):
        with pytest.raises(ObjectMissing):
            failing()
    counts = counters.snapshot()
    assert counts.requests == {
        "put": 1, "put_stream": 1, "get": 2, "get_range": 2, "get_prefix": 1, "head": 1,
        "list": 1, "delete": 1, "delete_many": 1,
    }  # fmt: skip
    assert (counts.bytes_up, counts.bytes_down) == (9, 10)
    assert counts.errors == {"ObjectMissing": 2}
    assert counts.total_requests == 11
    after = counts.since(before)
    assert after.requests == {"delete": 1, "delete_many": 1, "get": 1, "get_range": 1}
    assert (after.bytes_up, after.bytes_down, after.errors) == (0, 0, {"ObjectMissing": 2})


def test_a_snapshot_of_counts_is_frozen() -> None:
    """What was read stays as it was, and cannot be written."""
    counters = Counters()
    store = Metrics(memory(), counters)
    before = counters.snapshot()
    store.put("a", b"1")
    assert before.total_requests == 0
    with pytest.raises(FrozenInstanceError):
        before.bytes_up = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        before.requests["put"] = 1  # type: ignore[index]


def test_counting_from_many_threads() -> None:
    """No call is lost."""
    counters = Counters()
    store = Metrics(memory(), counters)
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda number: store.put(f"k/{number}", b"12"), range(500)))
    counts = counters.snapshot()
    assert (counts.requests["put"], counts.bytes_up) == (500, 1000)


def test_the_stack_counts_repeats_and_holds_no_place_while_it_waits() -> None:
    """Metrics see every repeat; while one call waits to be repeated another one runs."""

    class Clock:
        """A clock whose waits are used by somebody else."""

        time_s = 0.0

        def now_s(self) -> float:
            """See Clock."""
            return self.time_s

        def wait(self, seconds: float) -> None:
            """See Clock."""
            self.time_s += seconds
            with ThreadPoolExecutor(1) as executor:
                executor.submit(store.put, "other", b"12").result(60)

    counters, faults = Counters(), memory()
    faults.inject(Fault("put", "error", key="mine"))
    settings = Settings(store_concurrency=1)
    store = wrap(faults, settings, counters=counters, clock=Clock())
    store.put("mine", b"1")
    counts = counters.snapshot()
    assert (counts.requests["put"], counts.bytes_up) == (3, 3)
    assert counts.errors == {"StoreUnreachable": 1}


def test_faults_hit_what_the_plan_says() -> None:
    """Operation, part of the key, how many are let through and how many are hit; in that order."""
    faults = memory()
    faults.inject(Fault("put", "error", key="b", after=1, times=2))
    hit = []
    for number, key in enumerate(("a", "b/1", "b/2", "a", "b/3", "b/4")):
        try:
            faults.put(key, b"")
        except StoreUnreachable:
            hit.append(number)
    assert hit == [2, 4]
    assert [info.key for info in faults.list("")] == ["a", "b/1", "b/4"]
    assert faults.calls[2] == Call("put", "b/2", "error")
    assert faults.calls[-1] == Call("list", "", "")


def test_what_faults_do_to_the_effect() -> None:
    """An error comes before the effect, a lost answer after it, a lie changes what is read."""
    faults = memory()
    for kind in ("error", "timeout", "cut off"):
        faults.inject(Fault("put", kind))
        with pytest.raises(StoreUnreachable):
            faults.put("a", b"1")
        assert list(faults.list("")) == []
        faults.heal()
    faults.inject(Fault("put", "lost answer"))
    with pytest.raises(StoreUnreachable):
        faults.put("a", b"123456")
    faults.inject(Fault("read", "truncate"), Fault("read", "flip", after=1, times=3))
    assert faults.get("a", limit_bytes=9)[0] == b"123"
    assert faults.get("a", limit_bytes=9)[0] == b"123556"
    assert faults.get_range("a", 0, 2) == b"13"
    assert faults.get_prefix("a", 1)[0] == b"0"
    assert faults.get("a", limit_bytes=9)[0] == b"123456"
    with pytest.raises(Damaged):
        faults.get("a", limit_bytes=5)
