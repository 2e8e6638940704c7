"""Requests under an idempotency key, on a journal that takes no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from torpor.api.idempotency import Once
from torpor.errors import NoSpace, NotFound
from torpor.node.journal import Journal

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path


class FullJournal(Journal):
    """A journal whose disk is full as soon as `full` is set."""

    full = False

    def write(self, change: Callable[[sqlite3.Connection], object]) -> object:  # type: ignore[override]
        """See Journal."""
        if self.full:
            raise NoSpace("the disk is full")
        return super().write(change)


async def test_disk_that_is_full_when_it_is_done(tmp_path: Path) -> None:
    """What was done is answered, and its repeat too; what failed is told as it failed."""
    journal = FullJournal(tmp_path / "journal.sqlite")
    once = Once(journal)
    done = []

    async def work() -> int:
        journal.full = True
        done.append(1)
        return len(done)

    async def fail() -> int:
        journal.full = True
        raise NotFound("there is nothing")

    for _ in range(2):
        assert msgspec.json.decode(await once.do("key", "request", work)) == 1
    with pytest.raises(NoSpace):
        await once.do("another", "request", work)
    assert done == [1]
    journal.full = False
    with pytest.raises(NotFound):
        await once.do("third", "request", fail)
