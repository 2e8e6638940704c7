"""Fixtures for all tests: a clean environment; leak check, MinIO and VMs are in fixtures/."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["fixtures.minio", "fixtures.leaks", "fixtures.vms"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("TORPOR_", "AWS_")) and name not in ("TORPOR_MINIO",):
            monkeypatch.delenv(name)
