"""Working sets in wake objects: what was touched comes back, what was forged is refused by name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from fixtures.exchange import Quiet, make_key
from torpor.errors import Damaged, TorporError
from torpor.pager import opening
from torpor.snapshot.local import LocalSnapshots
from torpor.snapshot.repository.check import check
from torpor.snapshot.repository.keys import plain_keyring
from torpor.snapshot.repository.records import (
    Link,
    SnapshotRecord,
    WakeRecord,
    hash_bytes,
    seal,
    unseal,
)
from torpor.snapshot.repository.working_set import (
    SEGMENT_WINDOWS,
    open_segment,
    seal_segments,
    segment_windows,
)
from torpor.snapshot.windows import WINDOW_BYTES, Touched, window_length

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.exchange import Exchange
    from torpor.pager.opening import OpenedSnapshot

TOUCHED = (
    Touched("memory", (9, 2, 3, 63)),
    Touched("image", (6, 0)),
    Touched("app", (0,)),
    Touched("disk", (1,)),
)
SEALED = (Touched("image", (0, 6)), Touched("app", (0,)), Touched("memory", (2, 3, 9, 63)))
"""As it comes back: of memory, image and app, neighbours side by side."""


def open_as(exchange: Exchange) -> OpenedSnapshot:
    """Open the function as a pager does."""
    repository = exchange.repository
    resolved = repository.resolve("f", expect=exchange.function.digest)
    with ThreadPoolExecutor(1) as pool:
        return opening.open_snapshot(repository, resolved, pool)


@pytest.mark.parametrize("plain", [False, True])
def test_what_was_touched_comes_back(exchange: Exchange, plain: bool) -> None:
    """Windows of memory, image and app, in the order of their touch, with their bytes."""
    exchange.keyring = plain_keyring() if plain else make_key()
    exchange.function.record_working_set(TOUCHED)
    exchange.push()
    header = open_as(exchange).wake
    paths = {
        "memory": exchange.function.memory,
        "image": exchange.a.images[exchange.image],
        "app": exchange.a.images[exchange.app],
    }
    disks_first = sorted(TOUCHED[:3], key=lambda part: part.file == "memory")
    assert [record.file for record in header.working_set] == ["image", "app", "memory"]
    for record, part in zip(header.working_set, disks_first, strict=True):
        whole = paths[part.file].read_bytes()
        sealed = exchange.store.get_range(
            header.link.key, header.link.header_bytes + record.offset, record.length
        )
        windows = segment_windows(record, data_bytes=header.link.size_bytes)
        assert windows == sorted(part.windows)  # neighbours together: they are few
        content = open_segment(
            header.domain, header.link.key, record, sealed, size_bytes=len(whole)
        )
        assert content == b"".join(
            whole[number * WINDOW_BYTES : (number + 1) * WINDOW_BYTES] for number in windows
        )


def test_without_a_trial(exchange: Exchange) -> None:
    """A snapshot whose working set nobody knows is pushed without one."""
    exchange.push()
    assert open_as(exchange).wake.working_set == ()


def test_many_windows_are_many_segments(exchange: Exchange) -> None:
    """A segment has at most SEGMENT_WINDOWS windows; they follow each other in the object."""
    numbers = tuple(range(3 * SEGMENT_WINDOWS + 5))
    size = len(numbers) * WINDOW_BYTES - 1
    segments = list(
        seal_segments(
            exchange.keyring.current,
            "k",
            [Touched("memory", numbers)],
            read=lambda name, window: bytes([window % 251]) * window_length(window, size),
            origin=7,
            level=1,
        )
    )
    place = 7
    found: list[int] = []
    for record, sealed in segments:
        assert (record.offset, record.length) == (place, len(sealed))
        place += record.length
        windows = segment_windows(record, data_bytes=place)
        content = open_segment(exchange.keyring.current, "k", record, sealed, size_bytes=size)
        assert content[0] == windows[0] % 251
        found += windows
    assert tuple(found) == numbers


def test_what_is_opened_is_what_was_pushed(exchange: Exchange, tmp_path: Path) -> None:
    """Device state, disk and working set are the function's, and its memory is served."""
    exchange.function.record_working_set(TOUCHED)
    exchange.push()
    node = LocalSnapshots(tmp_path / "node")
    opening.publish(exchange.repository, open_as(exchange), node, memory=tmp_path / "served")
    snapshot = node.get(exchange.function.digest)
    assert snapshot.memory == tmp_path / "served"
    for name in ("disk", "vmstate"):
        there = (exchange.function.directory / name).read_bytes()
        assert (snapshot.directory / name).read_bytes() == there
    assert [path.name for path in node.root.iterdir()] == [snapshot.digest]
    assert snapshot.working_set() == SEALED


def test_what_is_pulled_keeps_it(exchange: Exchange) -> None:
    """A pulled snapshot has the working set, in the order in which it is pushed ahead of guests."""
    exchange.function.record_working_set(TOUCHED)
    exchange.push()
    exchange.pull("f")
    assert exchange.b.snapshots.get(exchange.function.digest).working_set() == SEALED


@pytest.mark.parametrize("file", ["image", "memory"])
def test_window_that_its_file_has_not(exchange: Exchange, tmp_path: Path, file: str) -> None:
    """A snapshot whose working set cannot be is neither pulled nor opened; a check names it."""
    exchange.keyring = plain_keyring()
    exchange.function.record_working_set(TOUCHED)
    exchange.push()
    key = forge(exchange, file=file, windows=b"\x00\x00\x00\x01")
    for bring in (
        lambda: exchange.pull("f"),
        lambda: opening.publish(
            exchange.repository,
            open_as(exchange),
            LocalSnapshots(tmp_path / "node"),
            memory=tmp_path / "served",
        ),
    ):
        with pytest.raises(Damaged, match="behind its file's end") as caught:
            bring()
        assert key in str(caught.value)
    assert list((tmp_path / "node").iterdir()) == []
    assert [one.key for one in check(exchange.repository, progress=Quiet()).problems] == [key]


def forge(exchange: Exchange, **changes: Any) -> str:  # noqa: ANN401
    """Replace fields of the first segment in the wake object's record; the object's key."""
    ref = exchange.repository.read_ref("f")
    assert ref is not None
    link = ref.record.wake
    data, _ = exchange.store.get(link.key, limit_bytes=1 << 24)
    record, domain = unseal(exchange.keyring, link.key, data[: link.header_bytes], WakeRecord)
    first, *others = record.working_set
    segment = msgspec.structs.replace(first, **changes)
    forged = msgspec.structs.replace(record, working_set=(segment, *others))
    header = seal(domain, link.key, forged)
    exchange.store.put(link.key, header + data[link.header_bytes :])
    wake = msgspec.structs.replace(
        link,
        size_bytes=len(header) + link.size_bytes - link.header_bytes,
        header_bytes=len(header),
        hash=hash_bytes(header),
    )
    stored = exchange.repository.read_snapshot(ref.record.snapshot, ref.record.manifest)
    manifest, _ = exchange.store.get(stored.link.key, limit_bytes=1 << 24)
    whole, _ = unseal(exchange.keyring, stored.link.key, manifest, SnapshotRecord)
    manifest = seal(domain, stored.link.key, msgspec.structs.replace(whole, wake=wake))
    exchange.store.put(stored.link.key, manifest)
    manifest_link = Link(key=stored.link.key, size_bytes=len(manifest), hash=hash_bytes(manifest))
    exchange.repository.write_ref(
        "f", snapshot=ref.record.snapshot, manifest=manifest_link, wake=wake, before=ref
    )
    return link.key


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file": "vmstate"}, "a segment of the file"),
        ({"file": "../etc/passwd"}, "a segment of the file"),
        ({"windows": b""}, "a segment of 0"),
        ({"windows": b"\x01\x00\x00"}, "a segment of"),
        ({"windows": bytes(4 * (SEGMENT_WINDOWS + 1))}, "a segment of 129"),
        ({"offset": -1}, "behind the object's end"),
        ({"offset": 1 << 40}, "behind the object's end"),
        ({"length": 0}, "behind the object's end"),
        ({"length": 1 << 30}, "behind the object's end"),
    ],
)
def test_segments_that_cannot_be(exchange: Exchange, changes: dict[str, Any], reason: str) -> None:
    """In a plain repository anybody may write a wake object: what cannot be is refused by name."""
    exchange.keyring = plain_keyring()
    exchange.function.record_working_set(TOUCHED)
    exchange.push()
    key = forge(exchange, **changes)
    with pytest.raises(Damaged, match=reason) as caught:
        open_as(exchange)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"windows": b"\x00\x00\x00\xff" * 4}, "behind its file's end"),
        ({"windows": bytes(8)}, "a segment of"),
        ({"hash": bytes(32)}, "hash"),
    ],
)
def test_segments_that_do_not_fit(exchange: Exchange, changes: dict[str, Any], reason: str) -> None:
    """What only the file or the data can tell is refused when the segment is opened."""
    exchange.keyring = plain_keyring()
    exchange.function.record_working_set(TOUCHED)
    exchange.push()
    forge(exchange, **changes)
    header = open_as(exchange).wake
    record = header.working_set[0]
    sealed = exchange.store.get_range(
        header.link.key, header.link.header_bytes + record.offset, record.length
    )
    with pytest.raises(Damaged, match=reason):
        open_segment(
            header.domain,
            header.link.key,
            record,
            sealed,
            size_bytes=exchange.function.manifest.memory.size_bytes,
        )


@pytest.mark.parametrize("kind", ["cut", "flip", "missing"])
def test_a_wake_object_that_is_not_right(exchange: Exchange, kind: str) -> None:
    """A wake object that was cut, changed or deleted is named, and nothing is published."""
    exchange.push()
    ref = exchange.repository.read_ref("f")
    assert ref is not None
    key = ref.record.wake.key
    data, _ = exchange.store.get(key, limit_bytes=1 << 24)
    match kind:
        case "cut":
            exchange.store.put(key, data[: ref.record.wake.header_bytes + 100])
        case "flip":
            exchange.store.put(key, bytes([data[0] ^ 1]) + data[1:])
        case "missing":
            exchange.store.delete(key)
    with pytest.raises(TorporError) as caught:
        open_as(exchange)
    assert key in str(caught.value)


def test_vmstate_that_is_not_right(exchange: Exchange, tmp_path: Path) -> None:
    """A bit that flips behind the header is found before anything is published."""
    exchange.push()
    opened = open_as(exchange)
    link = opened.stored.wake
    data, _ = exchange.store.get(link.key, limit_bytes=1 << 24)
    middle = link.header_bytes + 100
    exchange.store.put(link.key, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    node = LocalSnapshots(tmp_path / "node")
    with pytest.raises(Damaged, match=link.key):
        opening.publish(exchange.repository, open_as(exchange), node, memory=tmp_path / "m")
    assert list(node.root.iterdir()) == []
