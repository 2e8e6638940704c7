"""Whatever happens to an object, a pull refuses it by its name or brings the right bytes.

A bit flipped, bytes cut off or added, another valid object of its kind in its place, the same
content sealed with another key, nothing at all; in sealed repositories and in plain ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import assert_same, make_key
from fixtures.forging import LARGEST, open_raw, seal_raw
from fixtures.spoiling import flip, flipped, header_bytes, refuse, spoiled
from torpor.errors import DataError, KeyMissing, NotFound, ObjectMissing
from torpor.snapshot.repository.records import Kind

if TYPE_CHECKING:
    from fixtures.exchange import Exchange, TestNode
    from fixtures.spoiling import Damage, Pushed
    from torpor.snapshot.repository.keys import Keyring

pytestmark = pytest.mark.slow

RECORD_PARTS = {"magic": 0, "kind": 6, "version": 7, "key id": 8, "salt": 16, "body": 48}
"""Where the parts of a record's object begin (docs/format.md, "Record")."""


FLIPS = {f"flip in {part}": flip(at) for part, at in RECORD_PARTS.items()}
CUTS: dict[str, Damage] = {
    "empty": lambda _: b"",
    "one byte": lambda data: data[:1],
    "half a header": lambda data: data[:15],
    "the header": lambda data: data[:16],
    "header and salt": lambda data: data[:48],
    "half": lambda data: data[: len(data) // 2],
    "all but one byte": lambda data: data[:-1],
}
RECORD_DAMAGE: dict[str, Damage] = {
    **FLIPS,
    **CUTS,
    "flip at the end": flip(-1),
    "flip in the middle": lambda data: flipped(data, len(data) // 2),
    "a byte more": lambda data: data + b"\0",
    "twice": lambda data: data + data,
    "zeros": lambda data: bytes(len(data)),
}
DATA_DAMAGE: dict[str, Damage] = {
    "empty": lambda _: b"",
    "the header": lambda data: data[:16],
    "half a chunk": lambda data: data[:100],
    "zeros": lambda data: bytes(len(data)),
    "flip in the first chunk": flip(16),
    "flip in the first chunk's encoding": flip(16 + 12),
    "flip in its tag": flip(16 + 400),
    "flip in the middle": lambda data: flipped(data, len(data) // 2),
    "all but one byte": lambda data: data[:-1],
    "flip at the end": flip(-1),
    "shifted by one": lambda data: data[:16] + b"\0" + data[16:],
}


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
@pytest.mark.parametrize("kind", ["ref", "manifest", "image"])
def test_record(pushed: Pushed, node: TestNode, kind: str, damage: str) -> None:
    """A damaged ref, manifest or image record is refused by its name; mended, it is taken."""
    exchange, key = pushed.exchange, pushed.key(kind)
    data, _ = exchange.store.get(key, limit_bytes=LARGEST)
    with spoiled(exchange, key, RECORD_DAMAGE[damage](data)):
        refuse(exchange, node, key)
    assert_same(exchange.pull(node=node), exchange.function)


@pytest.mark.parametrize("damage", [name for name in RECORD_DAMAGE if "more" not in name])
def test_wake_header(pushed: Pushed, node: TestNode, damage: str) -> None:
    """A damaged header of a wake object is refused by the object's name."""
    exchange, key = pushed.exchange, pushed.key("wake header")
    whole, _ = exchange.store.get(key, limit_bytes=LARGEST)
    length = header_bytes(exchange)
    header, data = whole[:length], whole[length:]
    with spoiled(exchange, key, RECORD_DAMAGE[damage](header) + data):
        refuse(exchange, node, key)


@pytest.mark.parametrize("damage", ["flip at the end", "flip in the middle", "all but one byte"])
def test_wake_data(pushed: Pushed, node: TestNode, damage: str) -> None:
    """Damaged windows in a wake object are refused by the object's name."""
    exchange, key = pushed.exchange, pushed.key("wake data")
    whole, _ = exchange.store.get(key, limit_bytes=LARGEST)
    length = header_bytes(exchange)
    with spoiled(exchange, key, whole[:length] + DATA_DAMAGE[damage](whole[length:])):
        refuse(exchange, node, key)
    with spoiled(exchange, key, whole[: length + 10]):
        refuse(exchange, node, key)


@pytest.mark.parametrize("damage", DATA_DAMAGE)
def test_pack(pushed: Pushed, node: TestNode, damage: str) -> None:
    """A damaged pack is refused by its name."""
    exchange, key = pushed.exchange, pushed.key("pack")
    data, _ = exchange.store.get(key, limit_bytes=LARGEST)
    with spoiled(exchange, key, DATA_DAMAGE[damage](data)):
        refuse(exchange, node, key)


@pytest.mark.parametrize("kind", ["pack", "wake data"])
def test_bytes_that_no_record_names(pushed: Pushed, node: TestNode, kind: str) -> None:
    """Bytes behind the chunks of a pack or wake object are nobody's: the right ones arrive."""
    exchange, key = pushed.exchange, pushed.key(kind)
    data, _ = exchange.store.get(key, limit_bytes=LARGEST)
    with spoiled(exchange, key, data + data):
        assert_same(exchange.pull(node=node), exchange.function)


@pytest.mark.parametrize("kind", ["ref", "manifest", "wake header", "image", "pack"])
def test_swapped(pushed: Pushed, node: TestNode, kind: str) -> None:
    """Another valid object of its kind in an object's place is refused by that name."""
    exchange, key = pushed.exchange, pushed.key(kind)
    assert pushed.another(kind) != key
    data, _ = exchange.store.get(pushed.another(kind), limit_bytes=LARGEST)
    with spoiled(exchange, key, data):
        refuse(exchange, node, key)


@pytest.mark.parametrize("kind", ["manifest", "wake header", "image", "pack"])
def test_deleted(pushed: Pushed, node: TestNode, kind: str) -> None:
    """What a ref leads to and is not there is missing, by its name."""
    exchange, key = pushed.exchange, pushed.key(kind)
    with spoiled(exchange, key, None):
        assert isinstance(refuse(exchange, node, key), ObjectMissing)


def test_deleted_ref(pushed: Pushed, node: TestNode) -> None:
    """A ref that is not there is no damage: there is no such name."""
    with spoiled(pushed.exchange, "refs/f", None), pytest.raises(NotFound, match="'f'"):
        pushed.exchange.pull(node=node)
    assert node.left_over() == []


@pytest.mark.parametrize("kind", ["ref", "manifest", "wake header", "image", "pack"])
def test_sealed_with_another_key(pushed: Pushed, node: TestNode, kind: str) -> None:
    """The same content sealed with a key that is not this repository's is refused by its name."""
    exchange, key = pushed.exchange, pushed.key(kind)
    theirs = pushed.key(kind, pushed.other)
    data, _ = pushed.other.store.get(theirs, limit_bytes=LARGEST)
    if kind != "pack":
        domain = pushed.other.keyring.current
        length = header_bytes(pushed.other) if kind == "wake header" else len(data)
        record = open_raw(domain, theirs, data[:length])
        data = seal_raw(domain, Kind(data[6]), key, record) + data[length:]
    with spoiled(exchange, key, data):
        error = refuse(exchange, node, key)
        assert isinstance(error, KeyMissing) == (kind == "ref")


@pytest.mark.parametrize("kind", ["manifest", "image"])
def test_by_digest(pushed: Pushed, node: TestNode, kind: str) -> None:
    """Without a ref, too, damage has a name and is not taken for absence."""
    exchange, key = pushed.exchange, pushed.key(kind)
    data, _ = exchange.store.get(key, limit_bytes=LARGEST)
    for damaged in (flipped(data, 60), data[:-1], data[:3]):
        with spoiled(exchange, key, damaged):
            refuse(exchange, node, key, exchange.function.digest)


def test_swapped_under_another_name(pushed: Pushed, node: TestNode) -> None:
    """A whole snapshot copied below another's names is not taken for that one, by any way."""
    exchange, key = pushed.exchange, pushed.key("manifest")
    data, _ = exchange.store.get(pushed.another("manifest"), limit_bytes=LARGEST)
    with spoiled(exchange, key, data):
        refuse(exchange, node, key, exchange.function.digest)


def test_every_bit_of_a_ref(pushed: Pushed) -> None:
    """No single bit of a ref can change unnoticed."""
    exchange = pushed.exchange
    data, _ = exchange.store.get("refs/f", limit_bytes=LARGEST)
    for at in range(len(data)):
        exchange.store.put("refs/f", flipped(data, at))
        with pytest.raises(DataError, match="refs/f"):
            exchange.repository.read_ref("f")
    exchange.store.put("refs/f", data)


def test_wrong_key_for_everything(pushed: Pushed, node: TestNode) -> None:
    """A node with another key reads no record of a sealed repository, by name or by digest."""
    exchange = replace_keyring(pushed.exchange, make_key())
    with pytest.raises(KeyMissing, match="refs/f"):
        exchange.pull(node=node)
    with pytest.raises(NotFound):
        exchange.pull(exchange.function.digest, node=node)
    assert node.left_over() == []


def replace_keyring(exchange: Exchange, keyring: Keyring) -> Exchange:
    """The same nodes and store, seen with another keyring."""
    other = exchange.with_store(exchange.store)
    other.keyring = keyring
    return other
