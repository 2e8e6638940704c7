"""A furnished home and a daemon on it, for the tests of a module that leave it as it is."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.daemons import daemon
from fixtures.homes import Furnished, Home, furnish
from torpor.snapshot.repository.keys import create_keyring

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.daemons import DaemonProcess

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Furnished:
    """A home with snapshots and a key, to be copied."""
    furnished = furnish(Home(tmp_path_factory.mktemp("template") / "home", ""))
    create_keyring(furnished.home.path / "key")
    return furnished


@pytest.fixture
def a(tmp_path: Path, template: Furnished) -> Furnished:
    """A home with snapshots and a key."""
    subprocess.run(["cp", "-a", template.home.path, tmp_path / "a"], check=True)
    return replace(template, home=Home(tmp_path / "a", f"file://{tmp_path}/store"))


@pytest.fixture
def b(tmp_path: Path, a: Furnished) -> Home:
    """An empty home with the same key and the same store."""
    home = Home(tmp_path / "b", a.home.store)
    home.path.mkdir(mode=0o700)
    (home.path / "key").write_bytes((a.home.path / "key").read_bytes())
    (home.path / "key").chmod(0o600)
    return home


@pytest.fixture(scope="module")
def lasting(
    template: Furnished, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """A daemon on TCP too, for the tests of a module that change nothing."""
    home = tmp_path_factory.mktemp("lasting") / "a"
    subprocess.run(["cp", "-a", template.home.path, home], check=True)
    with daemon(home, "--api", "127.0.0.1:0", api_token=TOKEN) as running:
        yield running


@pytest.fixture
def served(a: Furnished) -> Iterator[DaemonProcess]:
    """A daemon on that home."""
    with daemon(a.home.path) as running:
        yield running
