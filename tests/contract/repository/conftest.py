"""A repository on a store in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import Exchange, TestNode, make_key
from fixtures.forging import Forger
from fixtures.memory import RAM
from fixtures.spoiling import Pushed, kept
from torpor.config import Settings
from torpor.snapshot.repository.keys import plain_keyring
from torpor.store.plain import open_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.store.interface import Store


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    """Two nodes and a repository on a store in memory."""
    return Exchange(tmp_path, _memory())


@pytest.fixture(scope="session", params=["sealed", "plain"])
def pushed(request: pytest.FixtureRequest) -> Iterator[Pushed]:
    """A repository of that sort, pushed once for all tests here, which put back what they spoil."""
    keyring = make_key() if request.param == "sealed" else plain_keyring()
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        made = Exchange(Path(directory), _memory(), keyring=keyring)
        other = made.with_store(_memory())
        other.keyring = make_key()
        for exchange in (made, other):
            exchange.push()
            exchange.push(exchange.instance, ref="g")
        yield Pushed(made, other)


@pytest.fixture
def node() -> Iterator[TestNode]:
    """A node that has nothing."""
    with tempfile.TemporaryDirectory(dir=RAM) as directory:
        yield TestNode(Path(directory) / "node")


@pytest.fixture
def forger(pushed: Pushed) -> Iterator[Forger]:
    """The pushed function in the hands of a forger; all is put back afterwards."""
    with kept(pushed.exchange):
        yield Forger(pushed.exchange.store, pushed.exchange.keyring.current)


def _memory() -> Store:
    return open_plain(Settings(), "memory://")
