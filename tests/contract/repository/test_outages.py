"""Push and pull over a MinIO whose answers are spoilt on the wire, or that is killed on the way."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import Exchange, assert_same
from fixtures.faulty_http import FaultyProxy, Spoil
from fixtures.memory import RAM
from torpor.config import Settings
from torpor.errors import StoreUnreachable
from torpor.snapshot.repository.pushing import PushOptions
from torpor.store.faults import Fault, Faults
from torpor.store.plain import open_plain
from torpor.store.stack import open_store, wrap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fixtures.faulty_http import Spoiling
    from fixtures.minio import MinioServer

pytestmark = [pytest.mark.minio, pytest.mark.slow]

SHORT_S = 0.3


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    """Nodes in memory, with a few packs between them; the store is the test's."""
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        options = PushOptions(pack_bytes=256 * 1024)
        yield Exchange(Path(directory), open_plain(Settings(), "memory://"), options=options)


@pytest.mark.parametrize(
    "kind", ["status", "lost answer", "reset answer", "truncate answer", "reset request"]
)
def test_spoilt_on_the_wire(
    exchange: Exchange,
    minio_server: MinioServer,
    tmp_path: Path,
    kind: Spoiling,
) -> None:
    """The first request for each kind of object, either way, is spoilt: both finish, all right."""
    settings = replace(minio_server.settings, store=f"s3://torpor-test/{tmp_path.name}")
    plan = [
        Spoil(kind, method="GET", target="?list"),
        Spoil(kind, method="POST", target="?delete"),
        *(
            Spoil(kind, method=method, target=f"{tmp_path.name}/{part}/")
            for method in ("PUT", "GET")
            for part in ("refs", "packs", "index", "leases", "images", "snapshots")
        ),
    ]
    with FaultyProxy(minio_server.port, *plan) as proxy:
        far = exchange.with_store(open_store(replace(settings, s3_endpoint=proxy.endpoint)))
        far.push()
        assert_same(far.pull(), exchange.function)
        far.push(exchange.instance)
        assert_same(far.pull(), exchange.instance)
        hit = [(method, target) for method, target, spoilt in proxy.seen if spoilt]
    assert len(hit) >= 10
    assert {method for method, _ in hit} == {"PUT", "GET", "POST"}
    assert list(open_store(settings).list("leases/")) == []


def test_killed_and_restarted(exchange: Exchange, mortal_minio: MinioServer) -> None:
    """MinIO is killed at four points of a push and three of a pull and comes back: both finish."""
    revived: list[threading.Thread] = []

    def kill() -> None:
        mortal_minio.kill()
        revived.append(threading.Thread(target=_revive, args=(mortal_minio,)))
        revived[-1].start()

    plain = open_plain(mortal_minio.settings, mortal_minio.settings.store_url())
    deaths = [
        Fault("put", "do", key="leases/", action=kill),
        Fault("put", "do", key="packs/", after=1, action=kill),
        Fault("put", "do", key="snapshots/", action=kill),
        Fault("put", "do", key="refs/", action=kill),
        Fault("get", "do", key="refs/", after=1, action=kill),
        Fault("get", "do", key="snapshots/", action=kill),
        Fault("get_range", "do", key="packs/", after=1, action=kill),
    ]
    faults = Faults(plain, *deaths)
    far = exchange.with_store(wrap(faults, replace(mortal_minio.settings, store_retry_s=120.0)))
    try:
        far.push()
        assert_same(far.pull(), exchange.function)
    finally:
        for thread in revived:
            thread.join()
    assert len(revived) == len(deaths)
    assert list(plain.list("leases/")) == []


def _revive(server: MinioServer) -> None:
    server.start()
    server.wait_ready()


def test_killed_for_longer(exchange: Exchange, mortal_minio: MinioServer) -> None:
    """MinIO stays away longer than the budget: a clean error; once it is back, all succeeds."""
    settings = replace(mortal_minio.settings, store_retry_s=SHORT_S)
    plain = open_plain(settings, settings.store_url())
    deadly = Fault("put", "do", key="packs/", after=1, action=mortal_minio.kill)
    with pytest.raises(StoreUnreachable, match="did not answer"):
        exchange.with_store(wrap(Faults(plain, deadly), settings)).push()
    _revive(mortal_minio)
    far = exchange.with_store(open_store(mortal_minio.settings))
    far.push()
    deadly = Fault("get_range", "do", key="packs/", after=1, action=mortal_minio.kill)
    with pytest.raises(StoreUnreachable, match="did not answer"):
        exchange.with_store(wrap(Faults(plain, deadly), settings)).pull()
    assert exchange.b.left_over() == []
    _revive(mortal_minio)
    assert_same(far.pull(), exchange.function)
