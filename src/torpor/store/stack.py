"""The one place where a store's wrappers are put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.store.plain import open_plain
from torpor.store.wrappers import Limit, Retry

if TYPE_CHECKING:
    from torpor.config import Settings
    from torpor.store.interface import Store


def open_store(settings: Settings) -> Store:
    """The store of these settings: backend, at most so many requests at a time, retries outside.

    Raises InvalidInput for a URL that is not understood; nothing is asked of the store yet.
    """
    plain = open_plain(settings, settings.store_url())
    limited = Limit(plain, concurrency=settings.store_concurrency)
    return Retry(limited, retries=settings.store_retries)
