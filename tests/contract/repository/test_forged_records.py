"""Garbage in any field of any record, written by somebody who can seal and hash what he writes.

Every leaf of every record is replaced by values that it must not have. A pull refuses, names an
object, allocates nothing on the word of a number and leaves nothing; the few fields that mean
nothing to it are listed.
"""

from __future__ import annotations

import copy
import re
import struct
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from fixtures.exchange import Exchange, TestNode, assert_same
from fixtures.forging import Forger
from fixtures.garbage import garbage, leaves, replaced, value_at
from fixtures.spoiling import kept, little_memory
from torpor.errors import DataError, ObjectMissing, TorporError
from torpor.snapshot.repository.records import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.garbage import Leaf
    from fixtures.spoiling import Pushed

pytestmark = pytest.mark.slow

OBJECT = r"object (refs/f|(snapshots|images|packs)/[0-9a-f/]+)"
RECORDS = ("ref", "snapshot", "wake", "image 0", "image 1")
HARMLESS: tuple[tuple[str, ...], ...] = (
    ("ref", "updated_ns"),
    ("ref", "wake"),
    ("snapshot", "base"),
    ("snapshot", "wake", "size_bytes"),
)
"""What a pull does not use: a time, the copy of the wake object's link, the base's record, and
where a wake object ends, all of these and what is below."""


def record_of(forger: Forger, what: str) -> Any:  # noqa: ANN401
    """The record of that name."""
    if what.startswith("image"):
        return forger.images[int(what[-1])]
    return getattr(forger, what)


def outcome(exchange: Exchange, node: TestNode) -> TorporError | None:
    """The error of a pull; None for one that brought the right bytes. It left nothing else."""
    error: TorporError | None = None
    try:
        assert_same(exchange.pull(node=node), exchange.function)
    except (DataError, ObjectMissing) as refused:
        error = refused
    if error is not None:
        assert node.left_over() == []
        assert re.search(OBJECT, str(error))
        return error
    node.snapshots.remove(exchange.function.digest)
    for path in [*node.images.values()]:
        path.unlink()
    node.images.clear()
    return None


@pytest.mark.parametrize("what", RECORDS)
def test_any_field(pushed: Pushed, node: TestNode, what: str) -> None:
    """No value of no field makes a pull fail unnamed, take anything wrong, or allocate much."""
    exchange = pushed.exchange
    accepted: set[Leaf] = set()
    with kept(exchange):
        forger = Forger(exchange.store, exchange.keyring.current, outlined=what == "ref")
        if what == "snapshot":  # else the wake object's copy of the disk is used, not the map's
            del forger.wake["files"]["disk"]
        forger.publish()
        honest = copy.deepcopy(record_of(forger, what))
        for leaf in [*leaves(honest)]:
            good = value_at(honest, leaf)
            for bad in garbage(good):
                if bad == good:
                    continue
                forger.late[what] = _setter(leaf, bad)
                forger.publish()
                if _measured(exchange, node) is None:
                    accepted.add((what, *leaf))
    harmful = {leaf for leaf in accepted if not any(leaf[: len(h)] == h for h in HARMLESS)}
    assert harmful == set()


def _measured(exchange: Exchange, node: TestNode) -> TorporError | None:
    with little_memory():
        return outcome(exchange, node)


def _setter(leaf: Leaf, value: Any) -> Any:  # noqa: ANN401
    def change(record: Any) -> Any:  # noqa: ANN401
        return replaced(record, leaf, value)

    return change


# bodies


def _array(count: int) -> bytes:
    """The MessagePack header of an array of so many."""
    return b"\xdd" + struct.pack(">I", count)


GIB = struct.pack(">I", 1 << 30)
MOST = struct.pack(">I", (1 << 32) - 1)
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "nil": b"\xc0",
    "a list": b"\x90",
    "an empty map": b"\x80",
    "a map that ends": b"\x85\xa4name",
    "an array of 4 Gi": b"\xdd" + MOST,
    "a map of 4 Gi": b"\xdf" + MOST,
    "a text of a GiB": b"\xdb" + GIB,
    "bytes of a GiB": b"\xc6" + GIB,
    "an extension of a GiB": b"\xc9" + GIB + b"\x01",
    "a key of a GiB": b"\x81\xdb" + GIB + b"name",
    "no UTF-8": b"\x81\xa4\xff\xfe\xfd\xfc\x01",
    "no UTF-8 in known texts": b"\x83\xa4name\xa1\xff\xa6digest\xa1\xff\xa5files\x81\xa1\xff\x01",
    "deep": b"\x81\xa4name" + b"\x91" * 100_000 + b"\xc0",
    "deep in a field that is not known": b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0",
    "packs of 4 Gi": b"\x81\xa6memory\x93\x00\xdd" + MOST,
    "runs of 4 Gi": b"\x81\xa6memory\x93\x00\x90\xdd" + MOST,
    "content of 4 Gi": b"\x81\xa7content\x93\x00\x90\xdd" + MOST,
    "files of 4 Gi": b"\x81\xa5files\xdf" + MOST,
    "images of 4 Gi": b"\x81\xa6images\xdd" + MOST,
    "many empty runs": b"\x81\xa7content\x93\x00\x90"
    + _array(5000)
    + b"\x95\x00\x00\x00\xc4\x00\xc4\x00" * 5000,
}


@pytest.mark.parametrize("body", BODIES)
def test_any_body(pushed: Pushed, node: TestNode, body: str) -> None:
    """No bytes in the place of a record make a pull fail unnamed or allocate what they claim."""
    exchange = pushed.exchange
    for what in RECORDS:
        with kept(exchange):
            forger = Forger(exchange.store, exchange.keyring.current)
            forger.late[what] = lambda _: BODIES[body]
            forger.publish()
            assert _measured(exchange, node) is not None


def _zstd(body: bytes, **options: Any) -> bytes:  # noqa: ANN401
    return zstandard.ZstdCompressor(level=3, **options).compress(body)


def _claim(body: bytes, size: int) -> bytes:
    """A frame whose header claims another size."""
    frame = _zstd(body, write_content_size=False)
    return frame[:4] + b"\xc0" + frame[5:6] + struct.pack("<Q", size) + frame[6:]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "only an encoding": lambda _: b"\x01",
    "an unknown encoding": lambda body: b"\x02" + body,
    "not compressed though it says so": lambda body: b"\x01" + body,
    "compressed though it does not say so": lambda body: b"\x00" + _zstd(body),
    "without its size": lambda body: b"\x01" + _zstd(body, write_content_size=False),
    "bytes behind the frame": lambda body: b"\x01" + _zstd(body) + b"x",
    "two frames": lambda body: b"\x01" + _zstd(body) * 2,
    "half a frame": lambda body: b"\x01" + _zstd(body)[:-20],
    "a claim of a GiB": lambda body: b"\x01" + _claim(body, 1 << 30),
    "a claim of all there is": lambda body: b"\x01" + _claim(body, (1 << 64) - 2),
    "a claim of one byte less": lambda body: b"\x01" + _claim(body, len(body) - 1),
    "a claim of one byte more": lambda body: b"\x01" + _claim(body, len(body) + 1),
    "a body that grows too much": lambda _: b"\x01" + _zstd(bytes(200 << 20)),
    "a body that is too long": lambda body: b"\x00" + body + bytes(1 << 20),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("what", ["ref", "snapshot", "wake", "image 0"])
def test_any_compression(pushed: Pushed, node: TestNode, what: str, packer: str) -> None:
    """No frame makes a pull fail unnamed or allocate what it claims."""
    exchange = pushed.exchange
    with kept(exchange):
        forger = Forger(exchange.store, exchange.keyring.current)
        forger.packers[what] = PACKERS[packer]
        forger.publish()
        assert _measured(exchange, node) is not None


@pytest.mark.parametrize(("kind", "version"), [(Kind.LEASE, 1), (0, 1), (255, 1), (None, 0)])
@pytest.mark.parametrize("what", ["ref", "snapshot", "wake", "image 0"])
def test_another_kind_or_version(
    pushed: Pushed, node: TestNode, what: str, kind: int | None, version: int
) -> None:
    """A record that was sealed as of another kind, or of a version that never was, is refused."""
    exchange = pushed.exchange
    with kept(exchange):
        forger = Forger(exchange.store, exchange.keyring.current)
        forger.headers[what] = (kind, version)
        forger.publish()
        assert "it says kind" in str(_measured(exchange, node))


def test_compressed_records_arrive(pushed: Pushed, node: TestNode) -> None:
    """Every record may be compressed, also when that makes it longer."""
    exchange = pushed.exchange
    with kept(exchange):
        forger = Forger(exchange.store, exchange.keyring.current)
        forger.packers = {what: lambda body: b"\x01" + _zstd(body) for what in RECORDS}
        forger.publish()
        assert _measured(exchange, node) is None
