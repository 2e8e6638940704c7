"""The ladder of fixtures for real VMs: built (images), deployed (once a session), restored."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torpor.image.library import ImageLibrary

from fixtures.nodes import EXAMPLES
from torpor.config import Settings
from torpor.node.node import Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A home with hello and ledger deployed. Its images are kept outside the tree between runs."""
    home = Path(os.environ.get("TORPOR_TEST_HOME", "/var/cache/torpor/test-home"))
    store = tmp_path_factory.mktemp("store")
    settings = Settings(home=home, store=f"file://{store}")

    async def deploy() -> None:
        async with Node.open(settings) as node:
            for name in ("hello", "ledger"):
                await node.deploy(EXAMPLES / name)

    async def remove() -> None:
        async with Node.open(settings) as node:
            for named in node.functions():
                await node.remove_function(named.names[0])

    asyncio.run(deploy())
    yield settings
    asyncio.run(remove())


@pytest.fixture
async def node(deployed: Settings) -> AsyncIterator[Node]:
    """The node with hello and ledger; instances that the test left are removed and reported."""
    async with Node.open(deployed) as node:
        yield node
        left = node.parts.journal.instances()
        for row in left:
            await node.instances.destroy(row.id)
        assert not left


@pytest.fixture
def fresh_settings(deployed: Settings, tmp_path: Path) -> Settings:
    """Settings of another node that has nothing but the store in common with the first."""
    return replace(deployed, home=tmp_path / "other")


@pytest.fixture
def imaged_settings(deployed: Settings, tmp_path: Path) -> Settings:
    """Settings of a node without functions but with the image of hello, not to build it again."""
    home = tmp_path / "imaged"
    home.mkdir()
    (home / "images").symlink_to(deployed.home / "images")
    return replace(deployed, home=home)


@pytest.fixture
def images(deployed: Settings) -> ImageLibrary:
    """The images of the session's home."""
    return ImageLibrary(deployed.home / "images")
