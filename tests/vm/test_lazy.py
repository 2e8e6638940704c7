"""Wakes out of the bucket: the guest runs while its memory still arrives."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import ask, running
from torpor.node.invoke import Request
from torpor.node.node import Node

if TYPE_CHECKING:
    from torpor.config import Settings

pytestmark = pytest.mark.vm


@pytest.fixture
def lazy_settings(fresh_settings: Settings) -> Settings:
    """Settings of a node that has nothing but the store, and wakes lazily."""
    return replace(fresh_settings, lazy=True)


async def test_wakes_from_the_store(node: Node, lazy_settings: Settings) -> None:
    """A function answers on a node that has nothing of it, and leaves no pager behind."""
    await node.push("hello")
    async with Node.open(lazy_settings) as other:
        async with running(other, "hello") as instance:
            answer = await ask(instance)
            counters = other.paging.client.counters()
            (opened,) = counters["snapshots"].values()
        assert answer["instance"] == instance.id
        assert opened["push"]["windows"] > 0
        assert opened["push"]["failure"] == ""
    assert not (lazy_settings.home / "pager").exists()


async def test_deploy_records_a_working_set(node: Node) -> None:
    """What a deploy's trials touched is kept beside the snapshot, in order."""
    touched = {
        part.file: part.windows for part in (await node.inspect("hello")).snapshot.working_set()
    }
    assert len(touched["memory"]) > 100
    assert len(set(touched["memory"])) == len(touched["memory"])
    assert list(touched["memory"]) != sorted(touched["memory"])


async def test_invoke_wakes_lazily_twice(node: Node, lazy_settings: Settings) -> None:
    """A second wake on the node needs no second fetch of the working set."""
    await node.push("hello")
    async with Node.open(lazy_settings) as other:
        first = await other.invoke("hello", Request())
        second = await other.invoke("hello", Request())
    assert first.response.status == second.response.status == 200
    assert not (lazy_settings.home / "pager").exists()
