"""A home that has the store of the others and not their key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.homes import Furnished, Home

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def stranger(tmp_path: Path, a: Furnished) -> Home:
    """An empty home with the same store and no key."""
    home = Home(tmp_path / "c", a.home.store)
    home.path.mkdir(mode=0o700)
    return home
