"""A repository on a store in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import Exchange
from torpor.config import Settings
from torpor.store.plain import open_plain

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    """Two nodes and a repository on a store in memory."""
    return Exchange(tmp_path, open_plain(Settings(), "memory://"))
