"""Fixtures for all tests: a clean environment, the leak check, the real MinIO."""

from __future__ import annotations

import os

import pytest

pytest_plugins = ["fixtures.leaks", "fixtures.minio"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("TORPOR_", "AWS_")) and name not in ("TORPOR_MINIO",):
            monkeypatch.delenv(name)
