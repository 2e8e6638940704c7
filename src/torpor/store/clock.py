"""Time for the store's wrappers, so that tests need not wait."""

from __future__ import annotations

import select
import time
from typing import Protocol

from torpor.host.cancel import checkpoint, current_token


class Clock(Protocol):
    """A clock that only goes forward, and waiting by it."""

    def now_s(self) -> float:
        """Seconds since some moment."""

    def wait(self, seconds: float) -> None:
        """Return when they have passed; raises Cancelled at once when the work is cancelled."""


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        """See Clock."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """See Clock."""
        deadline, token = self.now_s() + seconds, current_token()
        checkpoint()
        while (left := deadline - self.now_s()) > 0:
            select.select([token.fd] if token else [], [], [], left)
            checkpoint()
