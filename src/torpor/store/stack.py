"""The one place where a store's wrappers are put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.store.clock import Clock, SystemClock
from torpor.store.limit import Limit
from torpor.store.metrics import Counters, Metrics
from torpor.store.plain import open_plain
from torpor.store.retry import Retry

if TYPE_CHECKING:
    from torpor.config import Settings
    from torpor.store.interface import Store


def open_store(settings: Settings, *, counters: Counters | None = None) -> Store:
    """The store of these settings, wrapped.

    Raises InvalidInput for a URL that is not understood; nothing is asked of the store yet.
    """
    return wrap(open_plain(settings, settings.store_url()), settings, counters=counters)


def wrap(
    plain: Store,
    settings: Settings,
    *,
    counters: Counters | None = None,
    clock: Clock | None = None,
) -> Store:
    """A backend with its wrappers, from inside: metrics, limit, retry.

    Metrics are inside, so that `counters` see every request with all repeats; a call that waits
    to be repeated holds none of the limit's places.
    """
    counted = Metrics(plain, counters or Counters())
    limited = Limit(counted, concurrency=settings.store_concurrency)
    return Retry(limited, budget_s=settings.store_retry_s, clock=clock or SystemClock())
