"""Two writers of one ref at the same moment: one wins, the other is told, nothing is lost."""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import Exchange, TestNode, assert_same
from fixtures.memory import RAM
from torpor.config import Settings
from torpor.errors import Conflict
from torpor.store.faults import Fault, Faults
from torpor.store.plain import open_plain
from torpor.store.stack import wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.snapshot.local import LocalSnapshot


@pytest.fixture(
    params=[
        "memory",
        "file",
        pytest.param("s3", marks=pytest.mark.minio),
    ]
)
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of an empty store of each kind."""
    match request.param:
        case "memory":
            return Settings(store="memory://")
        case "file":
            return Settings(store=f"file://{tmp_path}/store")
    minio: Settings = request.getfixturevalue("minio_settings")
    return replace(minio, store=f"{minio.store}/{tmp_path.name}")


@pytest.fixture
def exchange(settings: Settings) -> Iterator[Exchange]:
    """Two nodes with that store between them, whose writers of refs wait for each other."""
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        plain = open_plain(settings, settings.store)
        yield Exchange(Path(directory), wrap(plain, settings))


def race(exchange: Exchange, barrier: threading.Barrier) -> dict[str, Conflict | None]:
    """Function and instance pushed to one ref, both having seen what it was before."""
    meet = Fault("put", "do", key="refs/f", times=2, action=barrier.wait)
    met = exchange.with_store(Faults(exchange.store, meet))

    def push(snapshot: LocalSnapshot) -> Conflict | None:
        try:
            met.push(snapshot)
        except Conflict as lost:
            return lost
        return None

    contestants = [exchange.function, exchange.instance]
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(push, contestants))
    return {s.digest: lost for s, lost in zip(contestants, ended, strict=True)}


@pytest.mark.parametrize("before", ["nothing", "base"])
def test_race(exchange: Exchange, before: str) -> None:
    """Exactly one wins; the loser's objects are there, and its second attempt is in order."""
    if before == "base":
        exchange.push(exchange.base)
    ended = race(exchange, threading.Barrier(2, timeout=60))
    losers = [digest for digest, lost in ended.items() if lost is not None]
    winners = [digest for digest, lost in ended.items() if lost is None]
    assert (len(losers), len(winners)) == (1, 1)
    lost = ended[losers[0]]
    assert lost is not None
    assert winners[0][:12] in lost.reason
    snapshots = {s.digest: s for s in (exchange.function, exchange.instance)}
    winner, loser = snapshots[winners[0]], snapshots[losers[0]]
    assert_same(exchange.pull(node=TestNode(exchange.directory / "c")), winner)
    assert_same(exchange.pull(loser.digest, node=TestNode(exchange.directory / "d")), loser)
    assert list(exchange.store.list("leases/")) == []
    assert exchange.push(loser).moved_bytes == 0
    assert_same(exchange.pull(node=TestNode(exchange.directory / "e")), loser)


def test_many_rounds(exchange: Exchange) -> None:
    """Whoever comes when: after each round the ref is one of the two, whole, and nobody hangs."""
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(_push_until_done, exchange, snapshot)
                for snapshot in (exchange.function, exchange.instance)
            ]
            assert [job.result() for job in jobs] == [None, None]
        ref = exchange.repository.read_ref("f")
        assert ref is not None
        assert ref.record.snapshot in (exchange.function.digest, exchange.instance.digest)
    assert_same(exchange.pull(), exchange.a.snapshots.get(ref.record.snapshot))


def _push_until_done(exchange: Exchange, snapshot: LocalSnapshot) -> None:
    while True:
        try:
            exchange.push(snapshot)
        except Conflict:
            continue
        return
