"""A store in memory, and fetchers that end with the test."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.paged import Ranges
from torpor.pager.fetcher import Fetcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeFetcher = Callable[..., Fetcher]


@pytest.fixture
def store() -> Ranges:
    """A store that can be made to fail."""
    return Ranges()


@pytest.fixture
def make_fetcher() -> Iterator[MakeFetcher]:
    """Fetchers by their arguments; one worker, a long deadline, nothing kept unless told.

    At the end none of their threads is left.
    """
    made: list[Fetcher] = []

    def make(**arguments: Any) -> Fetcher:  # noqa: ANN401
        defaults = {"workers": 1, "deadline_s": 60.0, "keep": lambda chunk_id, content: None}
        fetcher = Fetcher(**{**defaults, **arguments})
        made.append(fetcher)
        return fetcher

    yield make
    for fetcher in made:
        fetcher.close()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fetch-")]
