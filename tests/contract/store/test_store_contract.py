"""The contract of torpor.store.interface on every backend, plain and through the whole stack."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings
from torpor.errors import Damaged, InvalidInput, ObjectConflict, ObjectMissing, StoreDenied
from torpor.host.cancel import Cancelled, in_thread
from torpor.store.interface import Absent, Etag, Store
from torpor.store.plain import open_plain
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


def test_put_get_replace(store: Store) -> None:
    """What was put is got; a second put replaces it and changes the etag."""
    first = store.put("refs/a", b"one")
    assert store.get("refs/a", limit_bytes=10) == (b"one", first)
    second = store.put("refs/a", b"other")
    assert store.get("refs/a", limit_bytes=10) == (b"other", second)
    assert first != second


def test_stream_and_ranges(store: Store) -> None:
    """A stream of parts of any size is one object; ranges of it are exact."""
    parts = [bytes([n]) * (3 * MIB) for n in range(4)] + [b"", b"x", bytes(20 * MIB)]
    store.put_stream("packs/big", iter(parts))
    whole = b"".join(parts)
    assert store.head("packs/big").size_bytes == len(whole)
    assert store.get_range("packs/big", 3 * MIB - 2, 4) == b"\x00\x00\x01\x01"
    assert store.get_range("packs/big", len(whole) - 5, 5) == bytes(5)
    assert store.get("packs/big", limit_bytes=len(whole))[0] == whole


def test_ranges_that_are_not_there(store: Store) -> None:
    """A range that ends beyond the object is Damaged wherever it begins; an empty one is none."""
    store.put("a", b"12345")
    for offset, length in ((0, 6), (4, 2), (5, 1), (6, 1), (1000, 1)):
        with pytest.raises(Damaged, match="object a is too short"):
            store.get_range("a", offset, length)
    assert store.get_range("a", 3, 0) == b""
    for offset, length in ((-1, 1), (0, -1)):
        with pytest.raises(InvalidInput):
            store.get_range("a", offset, length)


def test_empty_object(store: Store) -> None:
    """An empty stream is an empty object, and so is an empty put."""
    store.put_stream("empty", iter(()))
    store.put("nothing", b"")
    for key in ("empty", "nothing"):
        assert store.head(key).size_bytes == 0
        assert store.get(key, limit_bytes=0)[0] == b""


def test_a_stream_that_fails_leaves_nothing(store: Store) -> None:
    """When the parts end in an error it comes through as it is, and nothing is visible."""

    class Gone(OSError):
        """No store's error, though it looks like one."""

    def parts() -> Iterator[bytes]:
        yield b"x" * (9 * MIB)
        raise Gone("the source is gone")

    with pytest.raises(Gone, match="the source is gone"):
        store.put_stream("half", parts())
    with pytest.raises(ObjectMissing):
        store.head("half")
    assert list(store.list("")) == []


def test_conditions(store: Store) -> None:
    """Absent creates once; Etag replaces only what was seen; the loser changes nothing."""
    etag = store.put("refs/c", b"1", condition=Absent())
    with pytest.raises(ObjectConflict):
        store.put("refs/c", b"2", condition=Absent())
    newer = store.put("refs/c", b"3", condition=Etag(etag))
    with pytest.raises(ObjectConflict):
        store.put("refs/c", b"4", condition=Etag(etag))
    assert store.get("refs/c", limit_bytes=9) == (b"3", newer)
    store.delete("refs/c")
    with pytest.raises(ObjectConflict):
        store.put("refs/c", b"5", condition=Etag(newer))
    with pytest.raises(ObjectMissing):
        store.head("refs/c")


@pytest.mark.parametrize("kind", ["absent", "etag"])
def test_of_many_writers_one_wins(store: Store, kind: str) -> None:
    """Of writers with the same condition exactly one succeeds, and its content is there."""
    condition = Absent() if kind == "absent" else Etag(store.put("refs/r", b"before"))
    together = threading.Barrier(4)

    def write(number: int) -> bytes | None:
        data = b"writer %d" % number
        together.wait()
        try:
            store.put("refs/r", data, condition=condition)
        except ObjectConflict:
            return None
        return data

    with ThreadPoolExecutor(4) as executor:
        won = [data for data in executor.map(write, range(4)) if data is not None]
    assert won == [store.get("refs/r", limit_bytes=99)[0]]


def test_missing_and_too_large(store: Store) -> None:
    """What is not there is ObjectMissing, what exceeds the limit Damaged; deletes repeat."""
    reads: list[Callable[[], object]] = [
        lambda: store.get("no", limit_bytes=1),
        lambda: store.head("no"),
        lambda: store.get_range("no", 0, 1),
        lambda: store.get_prefix("no", 1),
    ]
    for read in reads:
        with pytest.raises(ObjectMissing):
            read()
    store.put("large", b"12345")
    with pytest.raises(Damaged):
        store.get("large", limit_bytes=4)
    store.delete("large")
    store.delete("large")
    assert list(store.list("")) == []


def test_get_prefix(store: Store) -> None:
    """A prefix comes with the whole object's size and times; a short or empty object is whole."""
    etag = store.put("wake", b"0123456789")
    for length, data in ((4, b"0123"), (10, b"0123456789"), (99, b"0123456789")):
        got, info = store.get_prefix("wake", length)
        assert (got, info.key, info.size_bytes, info.etag) == (data, "wake", 10, etag)
        assert info == store.head("wake")
    store.put("none", b"")
    got, info = store.get_prefix("none", 5)
    assert (got, info.size_bytes) == (b"", 0)
    with pytest.raises(InvalidInput):
        store.get_prefix("wake", 0)


def test_delete_many(store: Store) -> None:
    """All of the keys are gone afterwards, whether they were there or not; others stay."""
    for key in ("a/1", "a/2", "b/1"):
        store.put(key, b"x")
    store.delete_many(key for key in ("a/1", "a/none", "a/2"))
    store.delete_many([])
    assert [info.key for info in store.list("")] == ["b/1"]
    with pytest.raises(InvalidInput):
        store.delete_many(["b/1", "../b"])
    assert store.head("b/1").size_bytes == 1


def test_list(store: Store) -> None:
    """Listing gives what is below the prefix, in order of keys, as head tells it."""
    for key in ("a/2", "a/1", "a/sub/3", "ab", "b/1"):
        store.put(key, key.encode())
    assert [info.key for info in store.list("a/")] == ["a/1", "a/2", "a/sub/3"]
    assert [info.key for info in store.list("")] == ["a/1", "a/2", "a/sub/3", "ab", "b/1"]
    assert list(store.list("none/")) == []
    for info in store.list(""):
        head = store.head(info.key)
        assert (info.size_bytes, info.etag) == (head.size_bytes, head.etag)
        assert int(info.last_modified) == int(head.last_modified)
    with pytest.raises(InvalidInput):
        store.list("a")


def test_leftovers(store: Store) -> None:
    """Removing leftovers, of whatever age, touches no object."""
    store.put("a/1", b"1")
    store.put_stream("a/2", iter((b"2",)))
    assert store.delete_leftovers(older_than_s=0) == 0
    assert [info.key for info in store.list("")] == ["a/1", "a/2"]


def test_a_killed_writer_to_a_directory(tmp_path: Path) -> None:
    """What it left is in no list and is no object; it goes when it is old enough."""
    settings = Settings(store=f"file://{tmp_path}")
    program = """if True:
        import os, signal, sys
        from torpor.config import Settings
        from torpor.store.stack import open_store

        def parts():
            for _ in range(40):
                yield bytes(1 << 20)
            os.kill(os.getpid(), signal.SIGKILL)

        open_store(Settings(store=sys.argv[1])).put_stream("packs/p", parts())
    """
    command = [sys.executable, "-c", program, settings.store]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 1
    store = open_store(settings)
    assert list(store.list("")) == []
    assert store.delete_leftovers(older_than_s=3600) == 0
    os.utime(left[0], (0, 0))
    assert store.delete_leftovers(older_than_s=3600) == 1
    assert not left[0].exists()


@pytest.mark.slow
@pytest.mark.minio
def test_more_objects_than_a_page_holds(s3_settings: Settings) -> None:
    """A list is whole and a deletion complete beyond the 1000 objects that S3 answers at once."""
    store = open_store(replace(s3_settings, store_concurrency=16))
    keys = [f"packs/{number:04}" for number in range(1050)]
    with ThreadPoolExecutor(16) as executor:
        list(executor.map(lambda key: store.put(key, b""), keys))
    assert [info.key for info in store.list("packs/")] == keys
    store.delete_many(keys[:-1])
    assert [info.key for info in store.list("")] == keys[-1:]


def test_times_are_the_stores_and_go_forward(store: Store) -> None:
    """An object that was written again is no older than before."""
    store.put("t", b"1")
    (before,) = store.list("")
    store.put("t", b"2")
    (after,) = store.list("")
    assert after.last_modified >= before.last_modified > 1.7e9


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "a//b", "..", "a b", "a/", ".lock", "a/.b"])
def test_keys_that_could_leave_the_prefix(store: Store, key: str) -> None:
    """Such keys are refused before the store is asked, by every method."""
    calls: list[Callable[[], object]] = [
        lambda: store.put(key, b""),
        lambda: store.put_stream(key, iter((b"",))),
        lambda: store.get(key, limit_bytes=1),
        lambda: store.get_range(key, 0, 1),
        lambda: store.get_prefix(key, 1),
        lambda: store.head(key),
        lambda: store.delete(key),
        lambda: store.delete_many([key]),
    ]
    for call in calls:
        with pytest.raises(InvalidInput):
            call()


async def test_cancelled_work_stops(store: Store) -> None:
    """Work whose caller is cancelled ends at its next step and leaves nothing visible."""
    started = threading.Event()
    seen: list[type[BaseException]] = []

    def parts() -> Iterator[bytes]:
        while True:
            yield b"x" * MIB
            started.set()

    def upload() -> None:
        try:
            store.put_stream("endless", parts())
        except BaseException as error:
            seen.append(type(error))
            raise

    work = asyncio.ensure_future(in_thread(upload))
    await asyncio.to_thread(started.wait)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert seen == [Cancelled]
    with pytest.raises(ObjectMissing):
        store.head("endless")


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "s3://", "s3:///x", "file://relative", "nonsense", "s3://b/../x"]
)
def test_urls(url: str) -> None:
    """A store URL that is not understood says which are."""
    with pytest.raises(InvalidInput, match="not a store"):
        open_plain(Settings(), url)


def test_no_credentials_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is not Amazon's is refused at once without any; AWS variables are some."""
    settings = Settings(s3_endpoint="http://127.0.0.1:9")
    with pytest.raises(StoreDenied, match="no credentials") as caught:
        open_plain(settings, "s3://bucket")
    assert "TORPOR_S3_ACCESS_KEY_ID" in caught.value.hint
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with pytest.raises(InvalidInput, match="Missing SecretAccessKey"):
        open_plain(settings, "s3://bucket")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    open_plain(settings, "s3://bucket")
    with pytest.raises(InvalidInput, match="only one is set"):
        open_plain(replace(settings, s3_access_key_id="key"), "s3://bucket")


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/1", "/sys/x", "/dev", "/etc", "/var/../usr"])
def test_directories_of_the_system_are_no_stores(path: str) -> None:
    """A file store is never made in a directory whose listing may not end or is not ours."""
    with pytest.raises(InvalidInput, match="is the system's"):
        open_plain(Settings(), f"file://{path}")


def test_a_file_is_no_store(tmp_path: Path) -> None:
    """A path that is not a directory is refused by name."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match="is not a directory"):
            open_plain(Settings(), f"file://{path}")
