"""Fixtures for all tests: a clean environment; leak check, MinIO and VMs are in fixtures/."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Images of Python set it: then each of some hundred torpor processes would compile all it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOMS = ("host", "vm", "chaos", "kvm")

pytest_plugins = [
    "fixtures.memory",
    "fixtures.own_hosts",
    "fixtures.minio",
    "fixtures.leaks",
    "fixtures.two_homes",
    "fixtures.vms",
    "fixtures.wheel",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in a directory of tests that change the host: one of the two runs takes it."""
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).parts[0]
        if room in ROOMS and not any(item.get_closest_marker(name) for name in ROOMS):
            item.add_marker(room)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("TORPOR_", "AWS_")) and name not in ("TORPOR_MINIO",):
            monkeypatch.delenv(name)
