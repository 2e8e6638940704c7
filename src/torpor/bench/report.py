"""What a benchmark prints: series of samples and ratios between them, never golden seconds."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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


@dataclass(frozen=True)
class Bound:
    """What is promised of a median: to be at most, or at least, `value`."""

    word: Literal["at most", "at least"]
    value: float

    def holds(self, median: float) -> bool:
        """Whether a median is as promised."""
        return median <= self.value if self.word == "at most" else median >= self.value

    def __str__(self) -> str:
        return f"{self.word} {self.value:.4g}"


def at_most(value: float) -> Bound:
    """A promise that a median is no more."""
    return Bound("at most", value)


def at_least(value: float) -> Bound:
    """A promise that a median is no less."""
    return Bound("at least", value)


@dataclass
class Report:
    """One run of one scenario."""

    scenario: str
    parameters: dict[str, Any]
    series: dict[str, Series] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    promises: dict[str, Bound] = field(default_factory=dict)
    """By name of a series or ratio."""

    def add(self, name: str, value: float, unit: str) -> None:
        """Add a sample to a series."""
        series = self.series.setdefault(name, Series(unit))
        if series.unit != unit:
            raise InternalError(f"series {name} is in {series.unit}, not in {unit}")
        series.samples.append(value)

    def compare(self, above: str, below: str, promised: Bound | None = None) -> Spread:
        """Add the ratio `above/below`, sample by sample of the same round."""
        pairs = zip(self.series[above].samples, self.series[below].samples, strict=True)
        spread = Spread.of([a / b for a, b in pairs])
        self.ratios[f"{above}/{below}"] = spread
        if promised is not None:
            self.promises[f"{above}/{below}"] = promised
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
            "promises": {
                name: {
                    "bound": str(bound),
                    "median": round(self._median(name), 6),
                    "holds": bound.holds(self._median(name)),
                }
                for name, bound in self.promises.items()
            },
        }

    def _median(self, name: str) -> float:
        if name in self.ratios:
            return self.ratios[name].median
        return statistics.median(self.series[name].samples)


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
