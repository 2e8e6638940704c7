"""Damage that pushes meet: what it must cost them, what it must not, and how they mend it."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.exchange import TestNode, assert_same, make_key
from fixtures.forging import LARGEST, open_raw, seal_raw
from fixtures.garbage import garbage, leaves, replaced, value_at
from fixtures.spoiling import flipped, kept
from torpor.errors import Conflict, Damaged, DataError, KeyMissing
from torpor.snapshot.repository.records import CondemnedRecord, Kind, LeaseRecord, seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fixtures.exchange import Exchange
    from fixtures.spoiling import Damage, Pushed

DAMAGE: dict[str, Damage] = {
    "empty": lambda _: b"",
    "short": lambda data: data[:20],
    "all but one byte": lambda data: data[:-1],
    "flip in the kind": lambda data: flipped(data, 6),
    "flip in the version": lambda data: flipped(data, 7),
    "flip in the key id": lambda data: flipped(data, 8),
    "flip in the salt": lambda data: flipped(data, 20),
    "flip in the body": lambda data: flipped(data, len(data) - 1),
    "longer": lambda data: data + b"\0",
}


pytestmark = pytest.mark.slow


@pytest.fixture
def spoilt(pushed: Pushed) -> Iterator[Exchange]:
    """The pushed repository, put back afterwards."""
    with kept(pushed.exchange):
        yield pushed.exchange


def each(exchange: Exchange, prefix: str, change: Callable[[str, bytes], bytes]) -> list[str]:
    """Change all objects below a prefix; their names."""
    keys = [info.key for info in exchange.store.list(prefix)]
    for key in keys:
        data, _ = exchange.store.get(key, limit_bytes=LARGEST)
        exchange.store.put(key, change(key, data))
    return keys


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_index(spoilt: Exchange, damage: str, node: TestNode) -> None:
    """Without sound indexes a push sends again what it cannot find, and arrives whole."""
    _forget_records(spoilt)
    packs = {info.key for info in spoilt.store.list("packs/")}
    each(spoilt, "index/", lambda _, data: DAMAGE[damage](data))
    spoilt.push()
    assert {info.key for info in spoilt.store.list("packs/")} > packs
    assert_same(spoilt.pull(node=node), spoilt.function)


def _forget_records(exchange: Exchange) -> None:
    """Only packs and indexes are left: a push finds what is there by the indexes alone."""
    for info in list(exchange.store.list("")):
        if info.key.startswith(("refs/", "snapshots/", "images/")):
            exchange.store.delete(info.key)


def _indexes(exchange: Exchange) -> dict[str, Any]:
    domain = exchange.keyring.current
    return {
        info.key: open_raw(domain, info.key, exchange.store.get(info.key, limit_bytes=LARGEST)[0])
        for info in exchange.store.list("index/")
    }


def _forge_index(exchange: Exchange, key: str, record: Any) -> None:  # noqa: ANN401
    exchange.store.put(key, seal_raw(exchange.keyring.current, Kind.INDEX, key, record))


@pytest.mark.slow
def test_lying_index(spoilt: Exchange, node: TestNode) -> None:
    """No garbage in an index that was sealed as it should be misleads a push."""
    key, honest = next(iter(_indexes(spoilt).items()))
    for number, leaf in enumerate(leaves(honest)):
        for place, bad in enumerate(garbage(value_at(honest, leaf))):
            _forget_records(spoilt)
            _forge_index(spoilt, key, replaced(honest, leaf, bad))
            spoilt.push()
            other = TestNode(node.directory.parent / f"{number}-{place}")
            assert_same(spoilt.pull(node=other), spoilt.function)


def test_index_that_swaps_chunks(spoilt: Exchange, node: TestNode) -> None:
    """Which chunk lies where a push takes on an index's word; who pulls finds out."""
    _forget_records(spoilt)
    for key, honest in _indexes(spoilt).items():
        ids = honest["ids"]
        _forge_index(spoilt, key, {**honest, "ids": ids[32:] + ids[:32]})
    spoilt.push()
    with pytest.raises(Damaged, match="object packs/"):
        spoilt.pull(node=node)
    assert node.left_over() == []


def test_index_with_impossible_lengths(spoilt: Exchange, node: TestNode) -> None:
    """An index whose lengths add up, though no chunk has them, is ignored."""
    _forget_records(spoilt)
    for key, honest in _indexes(spoilt).items():
        lengths = array.array("H", honest["lengths"])
        if len(lengths) > 1:
            lengths[0], lengths[1] = 0, lengths[0] + lengths[1]
        _forge_index(spoilt, key, {**honest, "lengths": lengths.tobytes()})
    spoilt.push()
    assert_same(spoilt.pull(node=node), spoilt.function)


def test_index_of_another_pack(spoilt: Exchange, node: TestNode) -> None:
    """An index that speaks of another pack than the one it is named after is ignored."""
    _forget_records(spoilt)
    (first, mine), (_, other) = list(_indexes(spoilt).items())[:2]
    count = len(other["lengths"]) // 2
    ids = (mine["ids"] * 9)[: 32 * count]
    _forge_index(spoilt, first, {**other, "ids": ids})
    spoilt.push()
    assert_same(spoilt.pull(node=node), spoilt.function)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_condemnation(spoilt: Exchange, damage: str) -> None:
    """A push that cannot read what is condemned refuses, naming it: it could build on that."""
    key = "condemned/" + "0" * 32
    record = CondemnedRecord(keys=("packs/" + "0" * 32,), leases=())
    spoilt.store.put(key, DAMAGE[damage](seal(spoilt.keyring.current, key, record)))
    spoilt.store.delete("refs/f")
    with pytest.raises(DataError, match=key):
        spoilt.push()
    assert [info.key for info in spoilt.store.list("leases/")] == []
    spoilt.store.delete(key)
    spoilt.push()


def test_condemnation_of_another_domain(spoilt: Exchange, node: TestNode) -> None:
    """What a collection with another key condemned is not built upon either."""
    packs = [info.key for info in spoilt.store.list("packs/")]
    key = "condemned/" + "0" * 32
    record = CondemnedRecord(keys=tuple(packs), leases=())
    spoilt.store.put(key, seal(make_key().current, key, record))
    spoilt.store.delete("refs/f")
    spoilt.push()
    for pack in packs:
        spoilt.store.delete(pack)
    assert_same(spoilt.pull(node=node), spoilt.function)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_lease(spoilt: Exchange, damage: str, node: TestNode) -> None:
    """Another push's lease is no business of a push, sound or not; it is left alone."""
    key = "leases/" + "0" * 32
    data = DAMAGE[damage](seal(spoilt.keyring.current, key, LeaseRecord(purpose="push", beats=1)))
    spoilt.store.put(key, data)
    spoilt.store.delete("refs/f")
    spoilt.push()
    assert_same(spoilt.pull(node=node), spoilt.function)
    assert spoilt.store.get(key, limit_bytes=LARGEST)[0] == data


@pytest.mark.parametrize("damage", [name for name in DAMAGE if "version" not in name])
def test_damaged_ref_is_mended(spoilt: Exchange, damage: str, node: TestNode) -> None:
    """Pushing to a name whose ref is damaged mends it; one of another key is left as it is."""
    data, _ = spoilt.store.get("refs/f", limit_bytes=LARGEST)
    broken = DAMAGE[damage](data)
    spoilt.store.put("refs/f", broken)
    if "key id" in damage:
        with pytest.raises(KeyMissing, match="refs/f"):
            spoilt.push()
        assert spoilt.store.get("refs/f", limit_bytes=LARGEST)[0] == broken
        return
    spoilt.push()
    assert_same(spoilt.pull(node=node), spoilt.function)


def test_broken_ref_is_not_mended_twice(spoilt: Exchange) -> None:
    """Of two who mend one ref the second learns of the first."""
    data, _ = spoilt.store.get("refs/f", limit_bytes=LARGEST)
    spoilt.store.put("refs/f", data[:-1])
    repository = spoilt.repository
    seen = repository.read_ref_to_replace("f")
    spoilt.push()
    ref = repository.read_ref("f")
    assert ref is not None
    with pytest.raises(Conflict, match="somebody else"):
        repository.write_ref(
            "f",
            snapshot=ref.record.snapshot,
            manifest=ref.record.manifest,
            wake=ref.record.wake,
            before=seen,
        )


def test_damaged_ref_can_be_deleted(spoilt: Exchange) -> None:
    """A ref need not be sound to be forgotten."""
    spoilt.store.put("refs/f", b"rubbish")
    spoilt.repository.delete_ref("f")
    assert spoilt.repository.read_ref("f") is None


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("prefix", ["snapshots/", "images/"])
def test_damaged_records_are_sent_again(
    spoilt: Exchange, prefix: str, damage: str, node: TestNode
) -> None:
    """A push builds on no damaged record: it sends what that was to say, and arrives whole."""
    each(spoilt, prefix, lambda _, data: DAMAGE[damage](data))
    spoilt.push()
    assert_same(spoilt.pull(node=node), spoilt.function)


@pytest.mark.parametrize("prefix", ["snapshots/", "images/", "packs/", "index/", "refs/"])
def test_deleted_objects_are_sent_again(spoilt: Exchange, prefix: str, node: TestNode) -> None:
    """What an error's hint says is true: delete what is damaged, push again, and all is well."""
    keys = [info.key for info in spoilt.store.list(prefix)]
    for key in keys if prefix in ("snapshots/", "refs/") else keys[:1]:
        spoilt.store.delete(key)
    spoilt.push()
    assert_same(spoilt.pull(node=node), spoilt.function)


@pytest.mark.parametrize("at", [0, 1, 2, -1])
def test_short_pack_is_sent_again(spoilt: Exchange, at: int, node: TestNode) -> None:
    """A pack that lost its end is seen to have, and its chunks are sent again."""
    key = [info.key for info in spoilt.store.list("packs/")][at]
    data, _ = spoilt.store.get(key, limit_bytes=LARGEST)
    spoilt.store.put(key, data[: len(data) // 2])
    spoilt.push()
    spoilt.push(spoilt.instance, ref="g")
    assert_same(spoilt.pull(node=node), spoilt.function)
    assert_same(spoilt.pull("g", node=TestNode(node.directory.parent / "m")), spoilt.instance)


def test_lying_parent(spoilt: Exchange, node: TestNode) -> None:
    """A child built on a forged record of its parent is not taken for what it is not."""
    repository = spoilt.repository
    ref = repository.read_ref("f")
    assert ref is not None
    key, domain = ref.record.manifest.key, spoilt.keyring.current
    forged = open_raw(domain, key, spoilt.store.get(key, limit_bytes=LARGEST)[0])
    runs = forged["memory"][2]
    _, pack, offset, lengths, ids = runs[-1]
    runs[1] = [runs[1][0], pack, offset, lengths[:2], ids[:32]]
    for name in ("refs/f", "refs/g"):
        spoilt.store.delete(name)
    others = [i.key for i in spoilt.store.list("snapshots/") if i.key != key]
    for other in others:
        spoilt.store.delete(other)
    spoilt.store.put(key, seal_raw(domain, Kind.MANIFEST, key, forged))
    spoilt.push(spoilt.instance, ref="g")
    with pytest.raises(Damaged, match="memory has another content"):
        spoilt.pull("g", node=node)
