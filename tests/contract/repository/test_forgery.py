"""What a bucket's writer may try with a repository, and what a push may not build on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from fixtures.exchange import assert_same, make_key
from torpor.errors import Damaged, InvalidInput
from torpor.snapshot.repository.domain import PlainDomain
from torpor.snapshot.repository.filemap import Entry, encode_map
from torpor.snapshot.repository.keys import Keyring, plain_keyring
from torpor.snapshot.repository.records import (
    CondemnedRecord,
    ImageRecord,
    Link,
    RefRecord,
    SnapshotRecord,
    hash_bytes,
    seal,
    unseal,
)
from torpor.snapshot.repository.repository import Repository, image_prefix

if TYPE_CHECKING:
    from fixtures.exchange import Exchange


def test_content_where_the_manifest_has_zeros(exchange: Exchange) -> None:
    """A map that fills a hole of the memory is refused, though all data has the right digest."""
    exchange.keyring = plain_keyring()
    exchange.push()
    repository = exchange.repository
    ref = repository.read_ref("f")
    assert ref is not None
    stored = repository.read_snapshot(ref.record.snapshot, ref.record.manifest)
    entries = list(stored.memory)
    extra = Entry(stored.memory.size_bytes // (16 * 1024) - 1, *entries[0][1:])
    assert stored.memory.get(extra.window) is None
    key = stored.link.key
    data, _ = exchange.store.get(key, limit_bytes=1 << 20)
    record, domain = unseal(exchange.keyring, key, data, SnapshotRecord)
    forged = msgspec.structs.replace(
        record, memory=encode_map(stored.memory.size_bytes, [*entries, extra])
    )
    data = seal(domain, key, forged)
    exchange.store.put(key, data)
    link = Link(key=key, size_bytes=len(data), hash=hash_bytes(data))
    repository.write_ref("f", snapshot=stored.digest, manifest=link, wake=stored.wake, before=ref)
    with pytest.raises(Damaged, match=r"memory has another content"):
        exchange.pull(expect=exchange.function.digest)
    assert exchange.b.left_over() == []


@pytest.mark.parametrize(
    "key", ["refs/f", "snapshots/../refs/f/manifest", "packs/" + "0" * 32, "", "/etc/passwd"]
)
def test_link_to_what_is_no_record(exchange: Exchange, key: str) -> None:
    """A ref that links to something that no manifest can be is refused by its own name."""
    exchange.keyring = plain_keyring()
    exchange.push()
    ref = exchange.repository.read_ref("f")
    assert ref is not None
    link = Link(key=key, size_bytes=100, hash=bytes(32))
    forged = msgspec.structs.replace(ref.record, manifest=link)
    exchange.store.put("refs/f", seal(PlainDomain(), "refs/f", forged))
    with pytest.raises(Damaged, match="refs/f"):
        exchange.pull()


def test_plain_record_among_sealed_ones(exchange: Exchange) -> None:
    """A push with a key never builds on a plain record, even when its ring reads plain objects."""
    exchange.push()
    image = exchange.repository.find_image(exchange.image)
    assert image is not None
    exchange.store.delete(image.link.key)
    exchange.push(ref="p", keyring=Keyring(PlainDomain()))
    plain = Repository(exchange.store, plain_keyring()).find_image(exchange.image)
    assert plain is not None
    prefix = image_prefix(exchange.keyring.current, exchange.image)
    body, _ = exchange.store.get(plain.link.key, limit_bytes=1 << 20)
    record, _ = unseal(plain_keyring(), plain.link.key, body, ImageRecord)
    forged = f"{prefix}{'0' * 32}"
    exchange.store.put(forged, seal(PlainDomain(), forged, record))
    ring = exchange.keyring.with_plain()
    assert Repository(exchange.store, ring).find_image(exchange.image) is None


def test_other_domains_condemnations_are_understood(exchange: Exchange) -> None:
    """A push heeds what a collection with another domain's key condemned."""
    exchange.push()
    pack = next(info.key for info in exchange.store.list("packs/"))
    key = "condemned/" + "0" * 32
    exchange.store.put(key, seal(make_key().current, key, CondemnedRecord(keys=(pack,), leases=())))
    exchange.store.delete("refs/f")
    again = exchange.push()
    assert any(name.startswith("packs/") for name in again.objects)
    exchange.store.delete(pack)
    assert_same(exchange.pull(), exchange.function)


def test_snapshot_whose_base_is_gone_is_not_taken_over(exchange: Exchange) -> None:
    """A record that another push left is used again only if all that it names is there."""
    exchange.push()
    stored = exchange.repository.find_snapshot(exchange.function.digest)
    assert stored is not None
    assert stored.base is not None
    exchange.store.delete(stored.base.manifest.key)
    exchange.store.delete("refs/f")
    exchange.push()
    repository = exchange.repository
    ref = repository.read_ref("f")
    assert ref is not None
    assert ref.record.manifest.key != stored.link.key
    now = repository.read_snapshot(ref.record.snapshot, ref.record.manifest)
    assert now.base is not None
    assert repository.read_snapshot(now.base.digest, now.base.manifest).digest == stored.base.digest


def test_record_that_no_reader_would_take(exchange: Exchange) -> None:
    """A record longer than its kind may be is not written."""
    link = Link(key="k" * 80_000, size_bytes=1, hash=bytes(32))
    ref_record = RefRecord(
        name="f",
        snapshot=exchange.function.digest,
        manifest=link,
        wake=None,  # type: ignore[arg-type]
        updated_ns=0,
    )
    with pytest.raises(InvalidInput, match="refs/f would be too long"):
        seal(exchange.keyring.current, "refs/f", ref_record)
