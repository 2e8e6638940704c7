"""Any windows, over any parents, in any order of pushes and pulls: what arrives is what was taken.

And what two trust domains store has nothing in common.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.exchange import (
    DISK_BYTES,
    MEMORY_BYTES,
    PAGE_BYTES,
    Exchange,
    TestNode,
    assert_same,
    make_key,
)
from fixtures.forging import LARGEST
from fixtures.memory import RAM
from torpor.config import Settings
from torpor.snapshot.repository.pushing import PushOptions
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.store.plain import open_plain

if TYPE_CHECKING:
    from torpor.snapshot.local import LocalSnapshot
    from torpor.store.interface import Store

pytestmark = pytest.mark.slow

BOUNDED = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _page(kind: str, seed: int) -> bytes:
    """A page of zeros, of one repeated byte, of text, or of noise, half or whole."""
    made = random.Random(seed)
    match kind:
        case "zero":
            return bytes(PAGE_BYTES)
        case "byte":
            return bytes([seed % 255 + 1]) * PAGE_BYTES
        case "text":
            return (b"function %d " % seed * PAGE_BYTES)[:PAGE_BYTES]
        case "sparse":
            return made.randbytes(100) + bytes(PAGE_BYTES - 100)
    return made.randbytes(PAGE_BYTES)


PAGES = st.builds(
    _page, st.sampled_from(["zero", "byte", "text", "sparse", "noise"]), st.integers(0, 5)
)
"""Few different ones, so that equal windows are common."""


def _writes(size_bytes: int) -> st.SearchStrategy[dict[int, bytes]]:
    """Pages here and there, and runs of pages, as a guest writes them."""
    last = size_bytes // PAGE_BYTES - 1
    single = st.dictionaries(st.integers(0, last), PAGES, max_size=12)
    run = st.tuples(st.integers(0, last), st.integers(1, 24), PAGES).map(
        lambda drawn: dict.fromkeys(range(drawn[0], min(drawn[0] + drawn[1], last + 1)), drawn[2])
    )
    return st.lists(st.one_of(single, run), max_size=3).map(
        lambda parts: {page: data for part in parts for page, data in part.items()}
    )


@dataclass(frozen=True)
class Generation:
    """What one generation writes over its parent, and whether it is pushed and pulled."""

    memory: dict[int, bytes]
    disk: dict[int, bytes]
    is_pushed: bool
    is_pulled: bool


GENERATIONS = st.lists(
    st.builds(Generation, _writes(MEMORY_BYTES), _writes(DISK_BYTES), st.booleans(), st.booleans()),
    min_size=1,
    max_size=4,
)
OPTIONS = st.builds(
    PushOptions,
    level=st.sampled_from([1, 3, 9]),
    pack_bytes=st.sampled_from([1, WINDOW_BYTES, 3 * WINDOW_BYTES, 1 << 20]),
    workers=st.integers(1, 3),
)


def _memory() -> Store:
    return open_plain(Settings(), "memory://")


def _objects(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key, limit_bytes=LARGEST)[0] for info in store.list("")}


def _chain(exchange: Exchange, generations: list[Generation]) -> list[LocalSnapshot]:
    made, parent = [], exchange.base
    for number, generation in enumerate(generations):
        parent = exchange.a.make_child(
            parent,
            exchange.app,
            memory=generation.memory,
            disk=generation.disk,
            seed=100 + number,
        )
        made.append(parent)
    return made


@BOUNDED
@given(generations=GENERATIONS, options=OPTIONS)
def test_what_arrives_is_what_was_taken(
    generations: list[Generation], options: PushOptions
) -> None:
    """Each generation arrives on an empty node, and on one that has what came before it."""
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        exchange = Exchange(Path(directory), _memory(), options=options)
        made = _chain(exchange, generations)
        for number, (snapshot, generation) in enumerate(zip(made, generations, strict=True)):
            if not generation.is_pushed and snapshot is not made[-1]:
                continue
            exchange.push(snapshot, ref=f"g{number}")
            empty = TestNode(exchange.directory / f"empty{number}")
            assert_same(exchange.pull(f"g{number}", node=empty), snapshot)
            empty.snapshots.verify(snapshot.digest)
            if generation.is_pulled or snapshot is made[-1]:
                assert_same(exchange.pull(f"g{number}"), snapshot)
        for number, snapshot in enumerate(made):  # later pushes changed nothing of earlier ones
            if f"g{number}" in exchange.repository.refs():
                again = TestNode(exchange.directory / f"again{number}")
                assert_same(exchange.pull(f"g{number}", node=again), snapshot)


@BOUNDED
@given(generations=GENERATIONS, options=OPTIONS)
def test_domains_share_nothing(generations: list[Generation], options: PushOptions) -> None:
    """Two domains with the same content share no chunk id, no ciphertext and no object name."""
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        exchange = Exchange(Path(directory), _memory(), options=options)
        made = _chain(exchange, generations)
        stores = []
        for _ in range(2):
            side = exchange.with_store(_memory())
            side.keyring = make_key()
            side.push(made[-1])
            stores.append(side)
        left, right = (_chunks(side) for side in stores)
        assert left[0]
        assert left[0].isdisjoint(right[0])
        assert left[1].isdisjoint(right[1])
        assert _objects(stores[0].store).keys() & _objects(stores[1].store).keys() == {"refs/f"}


def _chunks(exchange: Exchange) -> tuple[set[bytes], set[bytes]]:
    """The ids of all chunks of a repository, and 16 bytes at every place of their ciphertexts."""
    repository = exchange.repository
    ref = repository.read_ref("f")
    assert ref is not None
    stored = repository.read_snapshot(ref.record.snapshot, ref.record.manifest)
    maps = [stored.memory, stored.disk]
    maps += [repository.read_image(image).content for image in stored.images]
    ids = {entry.chunk_id for file in maps for entry in file}
    data = [d for key, d in _objects(exchange.store).items() if key.startswith("packs/")]
    pieces = {d[at : at + 16] for d in data for at in range(16, len(d) - 16, 16)}
    return ids, pieces
