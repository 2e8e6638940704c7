"""What a benchmark prints: series of samples and ratios between them, never golden seconds."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torpor import __version__
from torpor.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Series:
    """Samples of one quantity, in the order in which they were taken."""

    unit: str
    samples: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile, by linear interpolation between the samples."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        return cls(statistics.median(samples), _percentile(samples, 0.1), _percentile(samples, 0.9))


@dataclass
class Report:
    """One run of one scenario."""

    scenario: str
    parameters: dict[str, Any]
    series: dict[str, Series] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str) -> None:
        """Add a sample to a series."""
        series = self.series.setdefault(name, Series(unit))
        if series.unit != unit:
            raise InternalError(f"series {name} is in {series.unit}, not in {unit}")
        series.samples.append(value)

    def compare(self, above: str, below: str) -> Spread:
        """Add the ratio `above/below`, sample by sample of the same round."""
        pairs = zip(self.series[above].samples, self.series[below].samples, strict=True)
        spread = Spread.of([a / b for a, b in pairs])
        self.ratios[f"{above}/{below}"] = spread
        return spread

    def to_dict(self) -> dict[str, Any]:
        """The object that `torpor bench NAME --json` prints."""
        return {
            "scenario": self.scenario,
            "parameters": self.parameters,
            "series": {
                name: {"unit": series.unit, "samples": [round(s, 6) for s in series.samples]}
                for name, series in self.series.items()
            },
            "ratios": {
                name: {
                    "median": round(spread.median, 4),
                    "p10": round(spread.p10, 4),
                    "p90": round(spread.p90, 4),
                }
                for name, spread in self.ratios.items()
            },
        }


def host_parameters() -> dict[str, Any]:
    """Versions that every report carries."""
    return {
        "torpor": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }


def _percentile(samples: Sequence[float], fraction: float) -> float:
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
