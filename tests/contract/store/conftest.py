"""Each backend, plain and through the whole stack; MinIO through a proxy that can spoil things."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.faulty_http import FaultyProxy
from torpor.config import Settings
from torpor.store.clock import SystemClock
from torpor.store.plain import open_plain
from torpor.store.retry import Retry
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.minio import MinioServer
    from torpor.store.interface import Store

BACKENDS = ("memory", "file", "s3")


@pytest.fixture
def s3_settings(minio_settings: Settings, tmp_path: Path) -> Settings:
    """Settings for an empty prefix of the session's MinIO."""
    return replace(minio_settings, store=f"{minio_settings.store}/{tmp_path.name}")


@pytest.fixture(
    params=[
        pytest.param(
            (backend, wrapped),
            id=f"{backend}-{'stack' if wrapped else 'plain'}",
            marks=[pytest.mark.minio] if backend == "s3" else [],
        )
        for backend in BACKENDS
        for wrapped in (False, True)
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each store in turn, empty."""
    backend, wrapped = request.param
    match backend:
        case "memory":
            settings = Settings(store="memory://")
        case "file":
            settings = Settings(store=f"file://{tmp_path}/store")
        case _:
            settings = request.getfixturevalue("s3_settings")
    if wrapped:
        return open_store(settings)
    plain = open_plain(settings, settings.store)
    # MinIO closes the connection after a put that it refused, so a request can always be lost
    return Retry(plain, budget_s=20, clock=SystemClock()) if backend == "s3" else plain


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[FaultyProxy]:
    """A proxy in front of MinIO that does nothing until it is told to."""
    with FaultyProxy(minio_server.port) as running:
        yield running


@pytest.fixture
def proxied(s3_settings: Settings, proxy: FaultyProxy) -> Settings:
    """Settings for an empty prefix of MinIO that is asked through the proxy."""
    return replace(s3_settings, s3_endpoint=proxy.endpoint)
