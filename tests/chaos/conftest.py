"""A function in a real MinIO that tests may kill, and nodes that have nothing but that store."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.minio import BINARY, MinioServer
from fixtures.vault import NAME, write_vault
from torpor.host.fuse.connection import probe
from torpor.node.node import Node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.config import Settings


@pytest.fixture(scope="session")
def stored(
    deployed: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MinioServer, Settings]]:
    """A MinIO with the vault in it, and settings of a node that wakes lazily from there."""
    if not BINARY.exists():
        pytest.skip(f"there is no MinIO at {BINARY}; `make setup-test` builds it")
    if not probe().has_resend:
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")
    directory = tmp_path_factory.mktemp("vault")

    async def publish(settings: Settings) -> None:
        async with Node.open(settings) as node:
            await node.deploy(write_vault(directory))
            await node.push(NAME)
            await node.remove_function(NAME)

    with MinioServer(directory / "minio") as server:
        settings = replace(server.settings, home=deployed.home)
        asyncio.run(publish(settings))
        yield server, replace(settings, lazy=True)


@pytest.fixture
def minio(stored: tuple[MinioServer, Settings]) -> Iterator[MinioServer]:
    """The MinIO, which runs again after the test whatever became of it."""
    server, _ = stored
    yield server
    server.kill()
    server.start()
    server.wait_ready()


@pytest.fixture
def lazy_settings(stored: tuple[MinioServer, Settings], tmp_path: Path) -> Settings:
    """Settings of a fresh node: what passes is waited for as long as any machine may take."""
    _, settings = stored
    return replace(
        settings,
        home=tmp_path / "node",
        pager_deadline_s=200.0,
        store_retry_s=200.0,
        request_timeout_s=200.0,
    )
