"""Two homes and a store in a directory between them."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.homes import Furnished, Home, furnish
from torpor.snapshot.repository.keys import create_keyring

if TYPE_CHECKING:
    from pathlib import Path


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
    home = Home(tmp_path / "b", f"file://{tmp_path}/store")
    home.path.mkdir(mode=0o700)
    (home.path / "key").write_bytes((a.home.path / "key").read_bytes())
    (home.path / "key").chmod(0o600)
    return home


@pytest.fixture
def stranger(tmp_path: Path, a: Furnished) -> Home:
    """An empty home with the same store and no key."""
    home = Home(tmp_path / "c", a.home.store)
    home.path.mkdir(mode=0o700)
    return home
