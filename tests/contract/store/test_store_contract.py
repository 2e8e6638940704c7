"""The contract of torpor.store.interface on every backend, plain and with its wrappers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings
from torpor.errors import (
    Damaged,
    InvalidInput,
    ObjectConflict,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreUnreachable,
)
from torpor.store.clock import SystemClock
from torpor.store.faults import Fault, Faults
from torpor.store.interface import Absent, Etag, Store
from torpor.store.plain import open_plain
from torpor.store.retry import Retry
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(
    params=["memory", "file", "file stack", pytest.param("s3", marks=pytest.mark.minio)]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each backend in turn, empty."""
    if request.param == "memory":
        return open_plain(Settings(), "memory://")
    if request.param == "s3":
        settings = request.getfixturevalue("minio_settings")
        return open_store(replace(settings, store=f"{settings.store}/{tmp_path.name}"))
    settings = Settings(store=f"file://{tmp_path}/store")
    if request.param == "file":
        return open_plain(settings, settings.store)
    return open_store(settings)


def test_put_get_replace(store: Store) -> None:
    """What was put is got; a second put replaces it and changes the etag."""
    first = store.put("refs/a", b"one")
    assert store.get("refs/a", limit_bytes=10) == (b"one", first)
    second = store.put("refs/a", b"other")
    assert store.get("refs/a", limit_bytes=10) == (b"other", second)
    assert first != second


def test_stream_and_ranges(store: Store) -> None:
    """A stream of parts is one object; ranges of it are exact, beyond its end Damaged."""
    parts = [bytes([n]) * (3 << 20) for n in range(8)]
    store.put_stream("packs/big", iter(parts))
    whole = b"".join(parts)
    assert store.head("packs/big").size_bytes == len(whole)
    assert store.get_range("packs/big", 3 << 20, 10) == b"\x01" * 10
    with pytest.raises(Damaged):
        store.get_range("packs/big", len(whole) - 5, 10)


def test_empty_object(store: Store) -> None:
    """An empty stream is an empty object."""
    store.put_stream("empty", iter(()))
    assert store.head("empty").size_bytes == 0


def test_a_stream_that_fails_leaves_nothing(store: Store) -> None:
    """When the parts end in an error nothing is visible."""

    def parts() -> Iterator[bytes]:
        yield b"x" * (9 << 20)
        raise RuntimeError("the source is gone")

    with pytest.raises(Exception, match="the source is gone"):
        store.put_stream("half", parts())
    with pytest.raises(ObjectMissing):
        store.head("half")


def test_conditions(store: Store) -> None:
    """Absent creates once; Etag replaces only what was seen; the loser changes nothing."""
    etag = store.put("refs/c", b"1", condition=Absent())
    with pytest.raises(ObjectConflict):
        store.put("refs/c", b"2", condition=Absent())
    newer = store.put("refs/c", b"3", condition=Etag(etag))
    with pytest.raises(ObjectConflict):
        store.put("refs/c", b"4", condition=Etag(etag))
    assert store.get("refs/c", limit_bytes=9) == (b"3", newer)


def test_missing_and_too_large(store: Store) -> None:
    """What is not there is ObjectMissing, what exceeds the limit Damaged; deletes repeat."""
    for read in (
        lambda: store.get("no", limit_bytes=1),
        lambda: store.head("no"),
        lambda: store.get_range("no", 0, 1),
    ):
        with pytest.raises(ObjectMissing):
            read()
    store.put("large", b"12345")
    with pytest.raises(Damaged):
        store.get("large", limit_bytes=4)
    store.delete("large")
    store.delete("large")


def test_get_prefix(store: Store) -> None:
    """A prefix comes with the whole object's size and times; a short or empty object is whole."""
    etag = store.put("wake", b"0123456789")
    for length, data in ((4, b"0123"), (10, b"0123456789"), (99, b"0123456789")):
        got, info = store.get_prefix("wake", length)
        assert (got, info.key, info.size_bytes, info.etag) == (data, "wake", 10, etag)
    assert info.last_modified == store.head("wake").last_modified
    store.put("none", b"")
    got, info = store.get_prefix("none", 5)
    assert (got, info.size_bytes) == (b"", 0)
    with pytest.raises(ObjectMissing):
        store.get_prefix("absent", 5)


def test_delete_many(store: Store) -> None:
    """All of the keys are gone afterwards, whether they were there or not; others stay."""
    for key in ("a/1", "a/2", "b/1"):
        store.put(key, b"x")
    store.delete_many(["a/1", "a/none", "a/2"])
    store.delete_many([])
    assert [info.key for info in store.list("")] == ["b/1"]
    with pytest.raises(InvalidInput):
        store.delete_many(["b/1", "../b"])
    assert store.head("b/1").size_bytes == 1


def test_list(store: Store) -> None:
    """Listing gives what begins with the prefix, in order of keys."""
    for key in ("a/2", "a/1", "b/1"):
        store.put(key, key.encode())
    assert [info.key for info in store.list("a/")] == ["a/1", "a/2"]
    assert [info.size_bytes for info in store.list("b/")] == [3]


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "a//b", "..", "a b", "a/"])
def test_keys_that_could_leave_the_prefix(store: Store, key: str) -> None:
    """Such keys are refused before the store is asked."""
    with pytest.raises(InvalidInput):
        store.put(key, b"")


@pytest.mark.parametrize("url", ["", "ftp://x", "s3://", "file://relative", "nonsense"])
def test_urls(url: str) -> None:
    """A store URL that is not understood says which are."""
    with pytest.raises(InvalidInput, match="not a store"):
        open_plain(Settings(), url)


@pytest.mark.minio
def test_wrong_credentials_and_bucket(minio_settings: Settings) -> None:
    """Denied access and a missing bucket are told apart."""

    wrong = open_store(replace(minio_settings, s3_secret_access_key="wrong"))
    with pytest.raises(StoreDenied):
        wrong.put("a", b"")
    no_bucket = open_store(replace(minio_settings, store="s3://no-such-bucket"))
    with pytest.raises(StoreError, match="no bucket"):
        no_bucket.put("a", b"")


def test_unreachable() -> None:
    """A store that does not answer is StoreUnreachable after the retries."""
    settings = Settings(
        store="s3://b",
        s3_endpoint="http://127.0.0.1:9",
        s3_access_key_id="k",
        s3_secret_access_key="s",
        store_retry_s=0.5,
        store_timeout_s=2,
    )
    with pytest.raises(StoreUnreachable, match="did not answer"):
        open_store(settings).put("a", b"")


@pytest.mark.parametrize("kind", ["error", "lost answer"])
def test_retry_settles_conditional_puts(kind: str) -> None:
    """A put that was not answered is repeated; one that took effect is not a conflict."""
    plain = open_plain(Settings(), "memory://")
    faults = Faults(plain)
    faults.inject(Fault("put", kind, times=2))
    retry = Retry(faults, budget_s=4, clock=SystemClock())
    retry.put("refs/x", b"mine", condition=Absent())
    assert plain.get("refs/x", limit_bytes=9)[0] == b"mine"


def test_retry_gives_up() -> None:
    """After its retries the error comes through."""
    faults = Faults(open_plain(Settings(), "memory://"))
    faults.inject(Fault("head", "error", times=None))
    with pytest.raises(StoreUnreachable):
        Retry(faults, budget_s=0.2, clock=SystemClock()).head("a")
