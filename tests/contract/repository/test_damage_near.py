"""Pulls that build on what the node has: as strict, and not misled by what is wrong there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import assert_same
from fixtures.forging import LARGEST, Forger, seal_raw
from fixtures.spoiling import flipped, spoiled
from torpor.errors import DataError
from torpor.snapshot.repository.records import Kind

if TYPE_CHECKING:
    from fixtures.exchange import TestNode
    from fixtures.spoiling import Pushed


def test_damage_where_the_parent_is(pushed: Pushed, node: TestNode) -> None:
    """A pull that builds on what the node has is as strict, and leaves what was there."""
    exchange = pushed.exchange
    exchange.pull(node=node)
    before = node.left_over()
    repository = exchange.repository
    stored = repository.find_snapshot(exchange.instance.digest)
    parent = repository.find_snapshot(exchange.function.digest)
    assert stored is not None
    assert parent is not None
    fresh = next(iter(stored.memory.packs() - parent.memory.packs()))
    key = f"packs/{fresh.hex()}"
    data, _ = exchange.store.get(key, limit_bytes=LARGEST)
    with spoiled(exchange, key, flipped(data, 20)), pytest.raises(DataError, match=key):
        exchange.pull("g", node=node)
    assert node.left_over() == before
    assert_same(exchange.pull("g", node=node), exchange.instance)


def test_parent_on_the_node_is_damaged(pushed: Pushed, node: TestNode) -> None:
    """A parent that rotted on the node's own disk does not keep its children from arriving."""
    exchange = pushed.exchange
    near = exchange.pull(node=node)
    offset = near.manifest.memory.extents[0][0]
    near.memory.chmod(0o600)
    with near.memory.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"rotten")
    assert_same(exchange.pull("g", node=node), exchange.instance)


def test_parents_record_lies(pushed: Pushed, node: TestNode) -> None:
    """A forged record of the parent cannot make a child other than it is.

    It says that the parent has the child's windows already.
    """
    exchange = pushed.exchange
    exchange.pull(node=node)
    child = Forger(exchange.store, exchange.keyring.current, name="g")
    parent = Forger(exchange.store, exchange.keyring.current, name="f")
    kept, _ = exchange.store.get(parent.manifest_key, limit_bytes=LARGEST)
    forged = {**parent.snapshot, "memory": child.snapshot["memory"]}
    domain = exchange.keyring.current
    with spoiled(
        exchange, parent.manifest_key, seal_raw(domain, Kind.MANIFEST, parent.manifest_key, forged)
    ):
        assert_same(exchange.pull("g", node=node), exchange.instance)
    assert exchange.store.get(parent.manifest_key, limit_bytes=LARGEST)[0] == kept
