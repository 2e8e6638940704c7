"""What is pulled is what was pushed; only what is new travels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import PAGE_BYTES, assert_same, make_key, pages
from torpor.errors import Conflict, KeyMissing, NotFound
from torpor.snapshot.repository.keys import Keyring, plain_keyring
from torpor.snapshot.repository.repository import Repository
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.units import Digest

if TYPE_CHECKING:
    from fixtures.exchange import Exchange


def test_arrives_as_it_was(exchange: Exchange) -> None:
    """Memory, disk, device state and images are the same on a node that had nothing."""
    exchange.push()
    assert_same(exchange.pull(), exchange.function)
    for digest in (exchange.image, exchange.app):
        assert exchange.b.images[digest].read_bytes() == exchange.a.images[digest].read_bytes()


def test_plain(exchange: Exchange) -> None:
    """Without a key everything arrives too, for readers without and with one who ask for it."""
    exchange.push(keyring=plain_keyring())
    assert_same(exchange.pull(keyring=make_key().with_plain()), exchange.function)


def test_plain_is_refused_by_who_has_a_key(exchange: Exchange) -> None:
    """Who can write to the bucket cannot pass a snapshot of his own off as a sealed one."""
    exchange.push()
    exchange.store.delete("refs/f")
    exchange.push(exchange.instance, keyring=plain_keyring())
    with pytest.raises(KeyMissing, match="refs/f is not sealed"):
        exchange.pull()
    with pytest.raises(NotFound):
        exchange.pull(exchange.instance.digest)
    assert exchange.b.left_over() == []
    exchange.push(exchange.instance)
    assert_same(exchange.pull(), exchange.instance)


def test_generation_over_generation(exchange: Exchange) -> None:
    """An instance's snapshot over a function's over a base: complete, whoever was sent before."""
    exchange.push()
    exchange.push(exchange.instance, ref="g")
    assert_same(exchange.pull("g"), exchange.instance)


def test_a_near_snapshot_is_built_upon(exchange: Exchange) -> None:
    """On a node that has the parent, only the difference travels, zeroed windows included."""
    exchange.push()
    exchange.push(exchange.instance, ref="g")
    assert_same(exchange.pull("f"), exchange.function)
    assert_same(exchange.pull("g"), exchange.instance)


def test_unchanged_moves_nothing(exchange: Exchange) -> None:
    """The same snapshot under the same name again: no byte."""
    first = exchange.push()
    again = exchange.push()
    assert first.moved_bytes > 0
    assert again.moved_bytes == 0


def test_unwritten_windows_are_not_read(exchange: Exchange) -> None:
    """A child of a snapshot that is there: its parent's windows are taken over unread."""
    exchange.push()
    report = exchange.push(exchange.instance, ref="g")
    written = 2 * WINDOW_BYTES
    assert report.unread_bytes > 0
    disk = exchange.instance.disk.stat().st_size
    assert report.raw_bytes <= written + disk


def test_another_name_for_the_same_snapshot(exchange: Exchange) -> None:
    """A second ref to what is there costs the ref alone."""
    exchange.push()
    assert exchange.push(ref="h").moved_bytes == 0
    assert_same(exchange.pull("h"), exchange.function)


def test_second_function_shares_base_and_image(exchange: Exchange) -> None:
    """A sibling sends its own pages, app and records, neither base nor image."""
    first = exchange.push()
    app = exchange.a.make_image(12, size_bytes=3000)
    sibling = exchange.a.make_child(exchange.base, app, memory=pages(8, (5, 6)), name="s", seed=9)
    second = exchange.push(sibling, ref="s")
    assert second.moved_bytes < 0.4 * first.moved_bytes
    assert_same(exchange.pull("s"), sibling)


def test_by_digest(exchange: Exchange) -> None:
    """A whole digest works where no ref is known."""
    exchange.push()
    assert_same(exchange.pull(exchange.function.digest), exchange.function)


def test_unknown_name(exchange: Exchange) -> None:
    """A name and a digest that nobody pushed are told from each other and leave nothing."""
    with pytest.raises(NotFound, match="neither on this node nor in the store"):
        exchange.pull("nobody")
    with pytest.raises(NotFound, match="no snapshot"):
        exchange.pull("0" * 64)
    assert exchange.b.left_over() == []


def test_expected_digest(exchange: Exchange) -> None:
    """An old ref put back is refused by who knows which snapshot it wants."""
    exchange.push()
    old, _ = exchange.store.get("refs/f", limit_bytes=10_000)
    exchange.push(exchange.instance)
    exchange.store.put("refs/f", old)
    with pytest.raises(Conflict, match="points to snapshot"):
        exchange.pull(expect=exchange.instance.digest)
    assert exchange.b.left_over() == []
    assert_same(exchange.pull(expect=exchange.function.digest), exchange.function)


def test_two_writers_of_one_ref(exchange: Exchange) -> None:
    """Who comes second learns it and can repeat; what the first pushed is still there."""
    exchange.push()
    repository = exchange.repository
    seen = repository.read_ref("f")
    exchange.push(exchange.instance)
    stored = repository.find_snapshot(exchange.function.digest)
    assert stored is not None
    with pytest.raises(Conflict, match="somebody else"):
        repository.write_ref(
            "f",
            snapshot=stored.digest,
            manifest=stored.link,
            wake=stored.wake,
            before=seen,
        )
    assert_same(exchange.pull(), exchange.instance)
    exchange.push()
    again = exchange.pull(expect=exchange.function.digest)
    assert_same(again, exchange.function)


def test_wrong_key(exchange: Exchange) -> None:
    """Another key opens nothing: the object and both keys are named, nothing is left."""
    exchange.push()
    with pytest.raises(KeyMissing, match="refs/f is sealed with key"):
        exchange.pull(keyring=make_key())
    assert exchange.b.left_over() == []


def test_rotated_key(exchange: Exchange) -> None:
    """After a rotation the old snapshots are read, new ones are written with the new key."""
    exchange.push()
    fresh = make_key().current
    exchange.keyring = Keyring(fresh, (exchange.keyring.current,))
    assert_same(exchange.pull(), exchange.function)
    exchange.push(exchange.instance)
    assert_same(exchange.pull(keyring=Keyring(fresh)), exchange.instance)


def test_domains_share_nothing(exchange: Exchange) -> None:
    """Two domains in one bucket have no chunk id, no ciphertext and no object name in common."""
    exchange.push()
    first = _objects(exchange)
    other = make_key()
    exchange.push(ref="g", keyring=other)
    second = {key: data for key, data in _objects(exchange).items() if key not in first}
    assert second
    for data in first.values():
        for piece in range(0, len(data) - 64, WINDOW_BYTES // 2):
            assert not any(data[piece + 32 : piece + 64] in found for found in second.values())


def test_digest_is_not_in_any_name(exchange: Exchange) -> None:
    """Who lists a sealed bucket cannot tell which known snapshot or image it holds."""
    exchange.push()
    for key in _objects(exchange):
        for digest in (exchange.function.digest, exchange.image, exchange.app):
            assert digest[:16] not in key


def test_cut_off_push_is_resumed(exchange: Exchange) -> None:
    """What had arrived before a push was cut off is not sent again."""
    whole = exchange.push(exchange.instance).moved_bytes
    for info in list(exchange.store.list("")):
        if info.key.startswith(("refs/", "snapshots/", "images/")):
            exchange.store.delete(info.key)
    again = exchange.push(exchange.instance)
    packs = sum(size for key, size in again.objects.items() if key.startswith("packs/"))
    assert packs == 0
    assert again.moved_bytes < whole / 2
    assert_same(exchange.pull(), exchange.instance)


def test_lost_pack_is_sent_again(exchange: Exchange) -> None:
    """A pack that vanished from the bucket is made good by pushing the snapshot again."""
    exchange.push()
    victim = next(info.key for info in exchange.store.list("packs/"))
    exchange.store.delete(victim)
    exchange.store.delete("refs/f")
    exchange.push()
    assert_same(exchange.pull(), exchange.function)


def test_no_lease_is_left(exchange: Exchange) -> None:
    """A push that ended left no lease."""
    exchange.push()
    assert list(exchange.store.list("leases/")) == []


def test_zero_pages_over_parents(exchange: Exchange) -> None:
    """Windows that became zeros are zeros on the other node, by any way there."""
    zeroed = exchange.a.make_child(
        exchange.function,
        exchange.app,
        memory={page: bytes(PAGE_BYTES) for page in range(0, 100)},
        seed=12,
    )
    exchange.push()
    exchange.push(zeroed, ref="z")
    assert_same(exchange.pull("f"), exchange.function)
    assert_same(exchange.pull("z"), zeroed)


def _objects(exchange: Exchange) -> dict[str, bytes]:
    return {
        info.key: exchange.store.get(info.key, limit_bytes=1 << 30)[0]
        for info in exchange.store.list("")
    }


def test_digest_of_nothing_is_refused(exchange: Exchange) -> None:
    """A ref to a snapshot whose record is gone says which object is missing."""
    exchange.push()
    repository = Repository(exchange.store, exchange.keyring)
    ref = repository.read_ref("f")
    assert ref is not None
    exchange.store.delete(ref.record.manifest.key)
    with pytest.raises(Exception, match="manifest"):
        exchange.pull()
    assert Digest(exchange.function.digest) not in [
        snapshot.digest for snapshot in exchange.b.snapshots.list()
    ]
