"""Fetching: each chunk once, the urgent first, near ones together, no waiting without an end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fixtures.paged import DOMAIN, Gate, Ranges, chunk_of, put_chunks, put_pack, window
from torpor.errors import (
    Damaged,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    ObjectMissing,
    StoreDenied,
    StoreError,
)
from torpor.pager.fetcher import Fetcher, Priority
from torpor.snapshot.repository.repository import pack_key
from torpor.store.faults import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable

    from conftest import MakeFetcher
    from torpor.pager.fetcher import Chunk

DEMAND, WORKING_SET, HYDRATION = Priority


def key(number: int) -> str:
    """The object of a test's pack."""
    return pack_key(number.to_bytes(16, "big"))


def contents(chunks: Iterable[Chunk], seeds: Iterable[int]) -> dict[bytes, bytes]:
    """What fetching chunks of these seeds must bring."""
    return {chunk.chunk_id: window(seed) for chunk, seed in zip(chunks, seeds, strict=True)}


def test_many_who_want_the_same(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """32 threads that want the same chunks while they are on their way cost one request."""
    asked = threading.Semaphore(0)

    class Watched(Fetcher):
        def ask(self, *arguments: object, **more: object) -> list[object]:  # type: ignore[override]
            wants = super().ask(*arguments, **more)  # type: ignore[arg-type]
            asked.release()
            return wants  # type: ignore[return-value]

    chunks, gate = put_chunks(store, 1, range(3)), Gate()
    store.inject(gate.fault())
    fetcher = Watched(workers=4, deadline_s=60, keep=lambda chunk_id, content: None)
    with ThreadPoolExecutor(32) as threads:
        found = [threads.submit(fetcher.fetch, chunks, DEMAND) for _ in range(32)]
        for _ in found:
            assert asked.acquire(timeout=60)
        gate.open()
        assert all(future.result() == contents(chunks, range(3)) for future in found)
    fetcher.close()
    assert store.keys == [key(1)]
    counted = fetcher.counters()
    assert (counted.requests, counted.chunks, counted.failures) == (1, 3, 0)


def test_urgent_ones_overtake(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Demand is served before a working set, that before hydration, each in its order."""
    fetcher, gate = make_fetcher(), Gate()
    packs = {number: put_chunks(store, number, range(number, number + 1)) for number in range(7)}
    store.inject(gate.fault(key(0)))
    wants = fetcher.ask(packs[0], HYDRATION)
    gate.wait()
    for number, priority in ((1, HYDRATION), (2, HYDRATION), (3, WORKING_SET), (4, WORKING_SET)):
        wants += fetcher.ask(packs[number], priority)
    wants += fetcher.ask(packs[5], DEMAND)
    wants += fetcher.ask(packs[6], DEMAND)
    gate.open()
    assert all(want.done.wait(60) for want in wants)
    assert store.keys == [key(number) for number in (0, 5, 6, 3, 4, 1, 2)]


def test_what_becomes_urgent_overtakes(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """A chunk that waits for hydration and is then demanded goes first, and once."""
    fetcher, gate = make_fetcher(), Gate()
    packs = [put_chunks(store, number, range(number, number + 1)) for number in range(4)]
    store.inject(gate.fault(key(0)))
    wants = [want for chunks in packs for want in fetcher.ask(chunks, HYDRATION)]
    gate.wait()
    wants += fetcher.ask(packs[3], DEMAND)
    gate.open()
    assert all(want.done.wait(60) for want in wants)
    assert store.keys == [key(number) for number in (0, 3, 1, 2)]


def bring(fetcher: Fetcher, chunks: list[Chunk], priority: Priority) -> None:
    """Ask for chunks at once and wait until all are here."""
    wants = fetcher.ask(chunks, priority)
    assert all(want.done.wait(60) and want.error is None for want in wants)


def test_near_ones_come_in_one_request(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Neighbours share a request, over small gaps too, whatever the order of asking."""
    chunks = put_chunks(store, 1, range(10), gap_bytes=60_000)
    end = chunks[-1].offset + chunks[-1].length
    bring(make_fetcher(), chunks[:1] + chunks[:0:-1], HYDRATION)
    assert store.asked == [(key(1), 0, end)]


def test_far_ones_come_apart(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Chunks with more than a small gap between them are not bridged."""
    chunks = put_chunks(store, 1, range(4), gap_bytes=70_000)
    bring(make_fetcher(), chunks, HYDRATION)
    assert store.asked == [(key(1), chunk.offset, chunk.length) for chunk in chunks]


def test_demand_makes_short_requests(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """What a guest waits for is at most 256 KiB a request; the background takes up to 2 MiB."""
    chunks = put_chunks(store, 1, range(40))
    end = chunks[-1].offset + chunks[-1].length
    bring(make_fetcher(), chunks, DEMAND)
    assert len(store.asked) == 3
    assert all(length <= 256 * 1024 for _, _, length in store.asked)
    assert sum(length for _, _, length in store.asked) == end
    store.asked.clear()
    bring(make_fetcher(), chunks, HYDRATION)
    assert store.asked == [(key(1), 0, end)]


def test_an_outage_that_ends(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """What fails in passing is asked for again until it comes."""
    chunks = put_chunks(store, 1, range(2))
    store.inject(Fault("get_range", "error", times=2), Fault("get_range", "failure", after=2))
    fetcher = make_fetcher()
    assert fetcher.fetch(chunks, DEMAND) == contents(chunks, range(2))
    assert fetcher.counters().failures == 3


def test_an_outage_that_lasts(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """After the deadline whoever waits hears which object it was, and what the store said."""
    chunks = put_chunks(store, 1, range(2))
    store.inject(Fault("get_range", "error", times=None))
    with pytest.raises(DeadlineExceeded, match=rf"{key(1)} .* within 0\.3 s"):
        make_fetcher(deadline_s=0.3).fetch(chunks, DEMAND)
    store.heal()
    assert make_fetcher().fetch(chunks, DEMAND) == contents(chunks, range(2))


def test_a_store_that_hangs(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """The deadline holds for who waits even while the request does not return."""
    chunks, gate = put_chunks(store, 1, range(1)), Gate()
    store.inject(gate.fault())
    with pytest.raises(DeadlineExceeded, match="the store has not answered"):
        make_fetcher(deadline_s=0.2).fetch(chunks, DEMAND)
    gate.open()


def test_background_gives_way_in_an_outage(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """A worker that asks in vain for hydration leaves it for a demand, and takes it up again."""
    stuck, wanted = put_chunks(store, 1, range(1)), put_chunks(store, 2, range(2, 3))
    store.inject(Fault("get_range", "error", key=key(1), times=None))
    fetcher, gate = make_fetcher(), Gate()
    store.inject(gate.fault(key(2)))
    waiting = fetcher.ask(stuck, HYDRATION)
    demand = fetcher.ask(wanted, DEMAND)
    gate.wait()
    store.heal()
    gate.open()
    assert all(want.done.wait(60) and want.error is None for want in waiting + demand)


def test_damage_is_of_one_chunk(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """A flipped bit fails the chunk that it is in, naming object and offset; the others come."""
    chunks = put_chunks(store, 1, range(3))
    store.inject(Fault("get_range", "flip"))
    asked = make_fetcher().ask(chunks, DEMAND)
    assert all(want.done.wait(60) for want in asked)
    assert [want.error is None for want in asked].count(False) == 1
    (error,) = [want.error for want in asked if want.error is not None]
    assert isinstance(error, Damaged)
    assert key(1) in str(error)
    assert "at offset" in str(error)


@pytest.mark.parametrize(
    ("kind", "expected"), [("missing", ObjectMissing), ("denied", StoreDenied)]
)
def test_what_no_repetition_mends(
    store: Ranges, make_fetcher: MakeFetcher, kind: str, expected: type[StoreError]
) -> None:
    """A missing object and missing rights are heard of at once, whatever the deadline."""
    chunks = put_chunks(store, 1, range(1))
    store.inject(Fault("get_range", kind, times=None))  # type: ignore[arg-type]
    with pytest.raises(expected):
        make_fetcher(deadline_s=3600).fetch(chunks, DEMAND)
    assert len(store.asked) == 1


def test_answers_that_are_cut(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Half an answer is damage, never half a window."""
    chunks = put_chunks(store, 1, range(1))
    store.inject(Fault("get_range", "truncate"))
    with pytest.raises(Damaged, match=key(1)):
        make_fetcher().fetch(chunks, DEMAND)


def test_a_newer_encoding(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """A chunk of an unknown encoding is Incompatible, and its worker goes on."""
    chunk_id = DOMAIN.chunk_id(b"x")
    sealed = DOMAIN.seal_chunk(chunk_id, b"\x07x")
    store.put(key(1), sealed)
    (known,) = put_chunks(store, 2, range(1))
    odd = known._replace(key=key(1), offset=0, length=len(sealed), chunk_id=chunk_id)
    fetcher = make_fetcher()
    with pytest.raises(Incompatible):
        fetcher.fetch([odd], DEMAND)
    assert fetcher.fetch([known], DEMAND)


def test_a_mistake_of_ours(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """An exception that nobody expects reaches who waits, and the worker goes on."""
    chunks = put_chunks(store, 1, range(1))
    kept: list[bytes] = []

    def keep(chunk_id: bytes, content: bytes) -> None:
        kept.append(chunk_id)
        if len(kept) == 1:
            raise RuntimeError("a mistake")

    fetcher = make_fetcher(keep=keep)
    with pytest.raises(InternalError, match="a mistake"):
        fetcher.fetch(chunks, DEMAND)
    assert fetcher.fetch(chunks, DEMAND) == contents(chunks, range(1))


def test_maps_that_disagree(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Who asks for another chunk at the same place hears that it is not there, alone."""
    (right,) = put_chunks(store, 1, range(1))
    wrong = right._replace(chunk_id=bytes(32))
    fetcher = make_fetcher()
    good, bad = fetcher.ask([right, wrong], DEMAND)
    assert good.done.wait(60)
    assert bad.done.wait(60)
    assert good.content == window(0)
    assert isinstance(bad.error, Damaged)


def test_closing_while_others_wait(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """Whoever waits for a queued chunk, or asks later, hears that it ends; no thread is left."""
    gate, fetcher = Gate(), make_fetcher()
    store.inject(gate.fault(key(1)))
    under_way = fetcher.ask(put_chunks(store, 1, range(1)), HYDRATION)
    gate.wait()
    queued = put_chunks(store, 2, range(2, 3))
    waiting = fetcher.ask(queued, DEMAND)
    with ThreadPoolExecutor(1) as threads:
        closing = threads.submit(fetcher.close)
        assert waiting[0].done.wait(60)
        with pytest.raises(StoreError, match="ends"):
            fetcher.fetch(queued, DEMAND)
        gate.open()
        closing.result(60)
    assert under_way[0].content == window(0)
    assert isinstance(waiting[0].error, StoreError)


def test_each_chunk_is_kept_once(store: Ranges, make_fetcher: MakeFetcher) -> None:
    """What arrives is handed on for keeping, opened and verified."""
    kept: dict[bytes, bytes] = {}
    entries = put_pack(store, 1, {0: window(0), 1: window(1, 100)})
    chunks = [chunk_of(store, entry) for entry in entries.values()]
    fetcher = make_fetcher(keep=kept.__setitem__)
    fetcher.fetch(chunks, WORKING_SET)
    assert kept == {chunks[0].chunk_id: window(0), chunks[1].chunk_id: window(1, 100)}
