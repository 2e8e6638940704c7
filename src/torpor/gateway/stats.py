"""What the gateway counts: for metrics and for benchmarks."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Final

BUCKETS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)


@dataclass
class Histogram:
    """Durations since the start.

    `counts[i]` is how many were at most `BUCKETS_S[i]` and more than the bucket before; the last
    one is of those beyond all buckets.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """How many durations there were."""
        return sum(self.counts)


@dataclass(frozen=True)
class WakeRecord:
    """One wake. `how` is local, store or failed; `queued_s` passed before it might begin."""

    function: str
    how: str
    queued_s: float
    took_s: float


@dataclass(frozen=True)
class FunctionStats:
    """One function now, and its sums since the gateway started.

    `wakes` counts by how: local, store, failed. `responses` counts by status class: 2xx, 5xx, …,
    `lost` for those that were cut off. `wait` is from a request's head to an instance that takes
    it, `duration` to the end of its response.
    """

    name: str
    queued: int
    in_flight: int
    instances: int
    waking: int
    stopped: int
    refreshed: int
    wakes: dict[str, int]
    responses: dict[str, int]
    wait: Histogram
    duration: Histogram


@dataclass(frozen=True)
class GatewayStats:
    """The gateway now.

    `refused` counts requests that were malformed or meant no function, by status. `recent_wakes`
    are the last ones, oldest first.
    """

    connections: int
    functions: dict[str, FunctionStats]
    refused: dict[int, int]
    recent_wakes: tuple[WakeRecord, ...]
