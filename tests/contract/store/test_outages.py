"""The whole stack over a MinIO whose answers are spoilt, or that is killed and comes back."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.faulty_http import FaultyProxy, Spoil
from torpor.errors import ObjectConflict, ObjectMissing, StoreUnreachable
from torpor.store.interface import Absent, Etag, Store
from torpor.store.metrics import Counters
from torpor.store.plain import open_plain
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from fixtures.minio import MinioServer
    from torpor.config import Settings

pytestmark = [pytest.mark.minio, pytest.mark.slow]

DATA = os.urandom(1 << 20)


def use_all(store: Store, name: str) -> None:
    """Every operation once, and its result is right."""
    etag = store.put(f"{name}/a", DATA)
    assert store.get(f"{name}/a", limit_bytes=len(DATA)) == (DATA, etag)
    assert store.get_range(f"{name}/a", 1000, 500_000) == DATA[1000:501_000]
    prefix, info = store.get_prefix(f"{name}/a", 100_000)
    assert (prefix, info.size_bytes, info.etag) == (DATA[:100_000], len(DATA), etag)
    assert store.head(f"{name}/a").etag == etag
    store.put_stream(f"{name}/b", [DATA] * 20)
    assert store.head(f"{name}/b").size_bytes == 20 * len(DATA)
    etag = store.put(f"{name}/ref", b"1", condition=Absent())
    store.put(f"{name}/ref", b"2", condition=Etag(etag))
    assert store.get(f"{name}/ref", limit_bytes=9)[0] == b"2"
    assert [found.key for found in store.list(f"{name}/")] == [
        f"{name}/{key}" for key in ("a", "b", "ref")
    ]
    store.delete(f"{name}/a")
    store.delete_many([f"{name}/a", f"{name}/b", f"{name}/ref"])
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    "kind",
    ["status", "lost answer", "reset answer", "truncate answer", "reset request", "delay"],
)
def test_every_other_request_is_spoilt(proxied: Settings, proxy: FaultyProxy, kind: str) -> None:
    """All operations give the right result when every other request fails in passing."""
    plan = [Spoil(kind, after=2 * number, delay_s=0.01) for number in range(100)]
    proxy.spoil(*plan)
    use_all(open_store(proxied), "all")
    hits = [hit for *_, hit in proxy.seen]
    assert hits.count(kind) >= 9
    assert hits[0::2] == [kind] * len(hits[0::2])


def test_requests_that_hang(proxied: Settings, proxy: FaultyProxy) -> None:
    """A request that is never answered is given up after its own deadline, and repeated."""
    proxy.spoil(*(Spoil("hang", method=method) for method in ("PUT", "GET", "HEAD")))
    store = open_store(replace(proxied, store_timeout_s=0.4))
    store.put("a", b"1")
    assert store.get("a", limit_bytes=9)[0] == b"1"
    assert store.head("a").size_bytes == 1
    assert [hit for *_, hit in proxy.seen].count("hang") == 3


def test_a_store_that_stays_away(proxied: Settings, proxy: FaultyProxy) -> None:
    """After the budget the last error comes through, with how often it was tried."""
    proxy.spoil(Spoil("status", times=None))
    with pytest.raises(StoreUnreachable, match=r"SlowDown.*tried \d+ times"):
        open_store(replace(proxied, store_retry_s=0.3)).get("a", limit_bytes=1)


@pytest.mark.parametrize("kind", ["lost answer", "reset answer", "truncate answer"])
@pytest.mark.parametrize("condition", ["absent", "etag"])
def test_own_write_whose_answer_is_lost(
    proxied: Settings, proxy: FaultyProxy, kind: str, condition: str
) -> None:
    """A conditional put that took effect without an answer is success with the right etag."""
    store = open_store(proxied)
    wanted = Absent() if condition == "absent" else Etag(store.put("ref", b"before"))
    proxy.spoil(Spoil(kind, method="PUT"))
    etag = store.put("ref", b"mine", condition=wanted)
    assert store.get("ref", limit_bytes=9) == (b"mine", etag)
    assert store.put("ref", b"next", condition=Etag(etag)) != etag


@pytest.mark.parametrize("condition", ["absent", "etag"])
def test_anothers_write_between_the_repeats(
    proxied: Settings, proxy: FaultyProxy, s3_settings: Settings, condition: str
) -> None:
    """If another writer comes between a failure and its repeat, the loser learns it."""
    store, other = open_store(proxied), open_store(s3_settings)
    wanted = Absent() if condition == "absent" else Etag(store.put("ref", b"before"))
    proxy.spoil(
        Spoil("status", method="PUT"),
        Spoil("do", method="PUT", after=1, action=lambda: other.put("ref", b"his") and None),
    )
    with pytest.raises(ObjectConflict):
        store.put("ref", b"mine", condition=wanted)
    assert store.get("ref", limit_bytes=9)[0] == b"his"


def test_killed_and_restarted_in_the_middle(mortal_minio: MinioServer) -> None:
    """MinIO is killed under running requests and comes back: all of them end well."""
    counters = Counters()
    settings = replace(mortal_minio.settings, store_retry_s=120.0)
    with FaultyProxy(mortal_minio.port) as proxy:
        store = open_store(replace(settings, s3_endpoint=proxy.endpoint), counters=counters)
        store.put("before", DATA)

        def fall() -> None:
            mortal_minio.kill()
            mortal_minio.start()
            raise ConnectionResetError("the server died under this request")

        proxy.spoil(
            Spoil("do", method="PUT", after=3, action=fall),
            Spoil("do", method="GET", after=6, action=fall),
        )
        with ThreadPoolExecutor(4) as executor:
            names = [f"k/{number}" for number in range(12)]
            executor.submit(store.put_stream, "stream", [DATA] * 30).result()
            list(executor.map(lambda name: store.put(name, name.encode()), names))
            got = executor.map(lambda name: store.get(name, limit_bytes=99)[0], names)
            assert [*got] == [name.encode() for name in names]
        assert store.get("before", limit_bytes=len(DATA))[0] == DATA
        assert store.get("stream", limit_bytes=30 * len(DATA))[0] == DATA * 30
        assert counters.snapshot().errors["StoreUnreachable"] > 0
        assert [hit for *_, hit in proxy.seen].count("do") == 2
    assert mortal_minio.unfinished_uploads() == set()


def test_killed_for_longer_than_the_budget(mortal_minio: MinioServer) -> None:
    """What fails cleanly while the store is away succeeds when it is called again."""
    settings = replace(mortal_minio.settings, store_retry_s=0.3)
    store = open_store(settings)
    etag = store.put("ref", b"1")
    mortal_minio.kill()
    with pytest.raises(StoreUnreachable, match="Connection refused"):
        store.put("ref", b"2", condition=Etag(etag))
    with pytest.raises(StoreUnreachable):
        store.put_stream("s", [b"x"])
    with pytest.raises(StoreUnreachable):
        list(store.list(""))
    mortal_minio.restart()
    store.put("ref", b"2", condition=Etag(etag))
    assert [info.key for info in store.list("")] == ["ref"]
    with pytest.raises(ObjectMissing):
        store.head("s")


def test_two_writers_while_it_is_killed(mortal_minio: MinioServer) -> None:
    """Of two writers of one ref during a restart at most one succeeds, and it is the one there."""
    store = open_store(replace(mortal_minio.settings, store_retry_s=120.0))
    etag = store.put("ref", b"before")
    together = threading.Barrier(3)

    def write(data: bytes) -> bytes | None:
        together.wait()
        try:
            store.put("ref", data, condition=Etag(etag))
        except ObjectConflict:
            return None
        return data

    with ThreadPoolExecutor(2) as executor:
        won = [executor.submit(write, data) for data in (b"his", b"hers")]
        together.wait()
        mortal_minio.kill()
        mortal_minio.start()
        winners = [data for data in (future.result() for future in won) if data]
    mortal_minio.wait_ready()
    plain = open_plain(mortal_minio.settings, mortal_minio.settings.store)
    assert winners == [plain.get("ref", limit_bytes=9)[0]]
