"""Homes with pagers, on a file store, on MinIO, or on MinIO behind a proxy that can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.faulty_http import FaultyProxy
from fixtures.pagers import PagerHome
from torpor.config import Settings
from torpor.host.fuse.connection import probe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.minio import MinioServer


@pytest.fixture(scope="session", autouse=True)
def kernel_with_resend() -> None:
    """Without FUSE_NOTIFY_RESEND a pager that dies takes its mount with it."""
    if not probe().has_resend:
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")


@pytest.fixture
def file_settings(tmp_path: Path) -> Settings:
    """Settings with a file store."""
    return Settings(store=f"file://{tmp_path}/store")


@pytest.fixture
def home(tmp_path: Path, file_settings: Settings) -> Iterator[PagerHome]:
    """A home on a file store; its pager is ended and leaves nothing."""
    with PagerHome(tmp_path / "node", file_settings) as made:
        yield made


@pytest.fixture
def s3_settings(minio_settings: Settings, tmp_path: Path) -> Settings:
    """Settings for an empty prefix of the session's MinIO."""
    return replace(minio_settings, store=f"{minio_settings.store}/{tmp_path.name}", key="")


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[FaultyProxy]:
    """A proxy in front of MinIO that does nothing until it is told to."""
    with FaultyProxy(minio_server.port) as running:
        yield running


@pytest.fixture
def proxied(s3_settings: Settings, proxy: FaultyProxy, tmp_path: Path) -> Iterator[PagerHome]:
    """A home on MinIO that is asked through the proxy."""
    settings = replace(s3_settings, s3_endpoint=proxy.endpoint)
    with PagerHome(tmp_path / "node", settings) as made:
        yield made
