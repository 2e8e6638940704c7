"""Who ends an instance, and when, while others ask it or end it too."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings
from torpor.errors import Conflict
from torpor.gateway.fleet import NodeFleet
from torpor.host.lock import in_use
from torpor.node import claims
from torpor.node.node import Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A node with an instance that runs, without a VM."""
    settings = Settings(home=tmp_path / "home", runtime_dir=tmp_path / "run")
    async with Node.open(settings) as node:
        node.parts.journal.add_instance("one", function="f", snapshot="", port=80)
        node.parts.journal.set_running("one")
        (node.parts.instances_dir / "one").mkdir()
        yield node


async def test_who_is_asked_is_ended_after_its_answer(node: Node) -> None:
    """By several tasks too: the second one neither hastens it nor fails."""
    with in_use(node.parts.instances_dir / "one") as usable:
        assert usable
        ends = [asyncio.ensure_future(node.stop("one")) for _ in range(2)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.wait(ends)
        assert node.parts.journal.instance("one").state == "stopping"
    assert await asyncio.gather(*ends) == ["one", "one"]
    assert node.parts.journal.instances() == []
    with in_use(node.parts.instances_dir / "one") as usable:
        assert not usable


async def test_who_does_not_answer_is_ended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while; the gateway lets no function fall asleep under a request of others."""
    monkeypatch.setattr(claims, "_REQUESTS_END_S", 0.1)
    with in_use(node.parts.instances_dir / "one"):
        with pytest.raises(Conflict, match="asked by others"):
            await NodeFleet(node).stop("one")
        assert node.parts.journal.instance("one").state == "running"
        await node.stop("one")
    assert node.parts.journal.instances() == []
