"""Retry: what is repeated, how long, and whose a conflicting object is."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings
from torpor.errors import ObjectConflict, ObjectMissing, StoreDenied, StoreError, StoreUnreachable
from torpor.host.cancel import Cancelled, in_thread
from torpor.store.clock import SystemClock
from torpor.store.faults import Fault, Faults
from torpor.store.interface import Absent, Etag
from torpor.store.plain import open_plain
from torpor.store.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Iterator

BUDGET_S = 20.0


class FakeClock:
    """A clock that waits by moving on."""

    def __init__(self) -> None:
        self.time_s = 1000.0
        self.waits: list[float] = []

    def now_s(self) -> float:
        """See Clock."""
        return self.time_s

    def wait(self, seconds: float) -> None:
        """See Clock."""
        self.waits.append(seconds)
        self.time_s += seconds


class Bench:
    """Retry over faults over memory, on a clock that costs no time, with the longest waits."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.plain = open_plain(Settings(), "memory://")
        self.faults = Faults(self.plain, clock=self.clock)
        self.store = Retry(
            self.faults, budget_s=BUDGET_S, clock=self.clock, jitter=lambda _, high: high
        )

    def stored(self, key: str) -> bytes:
        """What is there."""
        return self.plain.get(key, limit_bytes=1000)[0]


@pytest.fixture
def bench() -> Bench:
    """An empty store that can be made to fail."""
    return Bench()


def test_waits_grow_to_a_bound_and_end_with_the_budget(bench: Bench) -> None:
    """Bounds double from 0.1 to 3 s; the last repeat begins when the budget ends, no later."""
    bench.faults.inject(Fault("head", "error", times=None))
    with pytest.raises(StoreUnreachable, match=r"tried 12 times in 20\.0 s"):
        bench.store.head("a")
    assert bench.clock.waits[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0]
    assert sum(bench.clock.waits) == pytest.approx(BUDGET_S)


def test_jitter_is_full(bench: Bench) -> None:
    """A wait is drawn from all between nothing and the bound."""
    asked: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    store = Retry(bench.faults, budget_s=1, clock=bench.clock, jitter=draw)
    bench.faults.inject(Fault("head", "error", times=3))
    with pytest.raises(ObjectMissing):
        store.head("a")
    assert asked == [(0.0, 0.1), (0.0, 0.2), (0.0, 0.4)]


def test_a_long_request_that_fails_is_repeated(bench: Bench) -> None:
    """The budget begins with the first failure, however long that request took."""
    bench.plain.put("a", b"1")
    bench.faults.inject(Fault("get", "timeout", delay_s=10 * BUDGET_S))
    assert bench.store.get("a", limit_bytes=9)[0] == b"1"


def test_no_budget_is_no_repeat(bench: Bench) -> None:
    """With a budget of nothing the first failure comes through as it is."""
    bench.faults.inject(Fault("head", "error"))
    with pytest.raises(StoreUnreachable) as caught:
        Retry(bench.faults, budget_s=0, clock=bench.clock).head("a")
    assert "tried" not in caught.value.reason
    assert len(bench.faults.calls) == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [("missing", ObjectMissing), ("denied", StoreDenied), ("failure", StoreError)],
)
def test_what_repeating_does_not_change_is_not_repeated(
    bench: Bench, kind: str, error: type[StoreError]
) -> None:
    """Such an error comes through after one request."""
    bench.faults.inject(Fault("any", kind, times=None))
    with pytest.raises(error):
        bench.store.get_prefix("a", 1)
    assert len(bench.faults.calls) == 1


@pytest.mark.parametrize("kind", ["error", "lost answer", "timeout", "cut off"])
def test_every_operation_is_repeated(bench: Bench, kind: str) -> None:
    """Whatever the call, a failure in passing before or after its effect changes no result."""
    every_other = [Fault("any", kind, after=2 * number) for number in range(10)]
    bench.faults.inject(*every_other)
    bench.store.put("a", b"12345")
    bench.store.put_stream("b", [b"12", b"34"])
    assert bench.store.get("a", limit_bytes=9)[0] == b"12345"
    assert bench.store.get_range("b", 1, 2) == b"23"
    assert bench.store.get_prefix("a", 2)[0] == b"12"
    assert bench.store.head("a").size_bytes == 5
    assert [info.key for info in bench.store.list("")] == ["a", "b"]
    bench.store.delete("a")
    bench.store.delete_many(["a", "b"])
    assert list(bench.store.list("")) == []
    assert [call.fault for call in bench.faults.calls] == [kind, ""] * 10


@pytest.mark.parametrize("condition", ["absent", "etag"])
@pytest.mark.parametrize("lost", [1, 3])
def test_a_conditional_put_recognises_its_own_write(
    bench: Bench, condition: str, lost: int
) -> None:
    """A put that took effect though its answer was lost is success, with the etag of now."""
    before = bench.plain.put("refs/x", b"before") if condition == "etag" else ""
    bench.faults.inject(Fault("put", "lost answer", times=lost))
    wanted = Etag(before) if condition == "etag" else Absent()
    etag = bench.store.put("refs/x", b"mine", condition=wanted)
    assert bench.plain.get("refs/x", limit_bytes=9) == (b"mine", etag)


def test_reading_back_is_repeated_too(bench: Bench) -> None:
    """The read that tells whose the object is may fail in passing as well."""
    bench.faults.inject(Fault("put", "lost answer"), Fault("get", "error", times=2))
    bench.store.put("refs/x", b"mine", condition=Absent())
    assert bench.stored("refs/x") == b"mine"


@pytest.mark.parametrize("other", [b"his", b"his, and longer", b""])
@pytest.mark.parametrize("kind", ["error", "lost answer"])
def test_anothers_write_is_a_conflict(bench: Bench, kind: str, other: bytes) -> None:
    """If another writer came first, or replaced ours, the put is ObjectConflict; his stays."""
    bench.faults.inject(
        Fault("put", kind),
        Fault("put", "do", after=1, action=lambda: put_other()),
    )

    def put_other() -> None:
        bench.plain.put("refs/x", other)

    with pytest.raises(ObjectConflict):
        bench.store.put("refs/x", b"mine", condition=Absent())
    assert bench.stored("refs/x") == other


def test_a_conflict_at_once_is_not_looked_into(bench: Bench) -> None:
    """Without a lost answer a conflict is one, even if the content is the same."""
    bench.plain.put("refs/x", b"mine")
    with pytest.raises(ObjectConflict):
        bench.store.put("refs/x", b"mine", condition=Absent())
    assert [call.operation for call in bench.faults.calls] == ["put"]


def test_a_stream_that_cannot_begin_anew_is_not_repeated(bench: Bench) -> None:
    """A generator is consumed once; its failure is its caller's to settle."""
    made = 0

    def parts() -> Iterator[bytes]:
        nonlocal made
        made += 1
        yield b"part"

    bench.faults.inject(Fault("put_stream", "lost answer"))
    with pytest.raises(StoreUnreachable):
        bench.store.put_stream("s", parts())
    assert (made, len(bench.faults.calls)) == (1, 1)


async def test_cancelled_while_waiting() -> None:
    """A caller that is cancelled while a repeat is waited for is not kept, nor repeated for."""
    waiting = threading.Event()
    faults = Faults(open_plain(Settings(), "memory://"))
    faults.inject(Fault("head", "error", times=None))
    store = Retry(faults, budget_s=1e6, clock=SystemClock(), jitter=lambda *_: waiting.set() or 1e5)
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            store.head("a")
        except BaseException as error:
            ended.append(error)
            raise

    work = asyncio.ensure_future(in_thread(ask))
    await asyncio.to_thread(waiting.wait)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert [type(error) for error in ended] == [Cancelled]
    assert len(faults.calls) == 1
