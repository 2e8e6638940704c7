"""Lazily woken instances whose pager or store dies under them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import ask
from torpor.errors import VmmFailed
from torpor.node.invoke import Request
from torpor.node.leftovers import find_leftovers
from torpor.node.node import Node
from torpor.pager.keeper import Places

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.config import Settings

pytestmark = pytest.mark.chaos


@pytest.fixture
def lazy_settings(fresh_settings: Settings) -> Settings:
    """Settings of a node that has nothing but the store, and wakes lazily."""
    return replace(fresh_settings, lazy=True)


async def test_store_gone_under_a_running_function(
    node: Node, lazy_settings: Settings, tmp_path: Path
) -> None:
    """A request that needs a window the store cannot give fails naming it; nothing is left."""
    await node.push("hello")
    own_store = tmp_path / "own-store"
    shutil.copytree(lazy_settings.store.removeprefix("file://"), own_store)
    settings = replace(
        lazy_settings, store=f"file://{own_store}", pager_deadline_s=2.0, request_timeout_s=20.0
    )
    async with Node.open(settings) as other:
        other.paging.pushes = False  # the function's own memory is then still in the store
        instance = await other.restore("hello", kept=True)
        shutil.rmtree(own_store)
        with pytest.raises(VmmFailed, match="window") as caught:
            await other.invoke("hello", Request())
        assert "window" in caught.value.reason
        assert caught.value.exit_code == VmmFailed.exit_code
        await other.stop_instance(instance)
    assert find_leftovers(settings) == []


async def test_pager_killed_under_an_instance(node: Node, lazy_settings: Settings) -> None:
    """The keeper starts another pager, and the guest answers on."""
    await node.push("hello")
    places = Places(lazy_settings.home)
    async with Node.open(lazy_settings) as other:
        other.paging.pushes = False
        instance = await other.restore("hello", kept=True)
        killed = places.identity("pager")
        assert killed is not None
        killed.kill()
        assert (await ask(instance))["instance"] == instance.id
        assert other.paging.client.counters()["pid"] != killed.pid
        await other.stop_instance(instance)
    assert find_leftovers(lazy_settings) == []


async def test_keeper_and_pager_killed(node: Node, lazy_settings: Settings) -> None:
    """The next command removes the instances that lost their memory, and all of the pager."""
    await node.push("hello")
    places = Places(lazy_settings.home)
    async with Node.open(lazy_settings) as other:
        await other.restore("hello")
        for who in ("keeper", "pager"):
            killed = places.identity(who)
            assert killed is not None
            killed.kill()
    async with Node.open(lazy_settings) as again:
        assert again.parts.journal.instances() == []
    assert find_leftovers(lazy_settings) == []
