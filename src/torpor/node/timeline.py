"""Where the time of one operation went."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Step:
    """One step: seconds from the timeline's beginning to the step's, and the step's own."""

    name: str
    begin_s: float
    duration_s: float


@dataclass
class Timeline:
    """Steps by name; they may overlap. Belongs to one thread."""

    _origin: float = field(default_factory=time.perf_counter)
    steps: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the body; a body that raises is not recorded."""
        begin = time.perf_counter()
        yield
        self.steps.append(Step(name, begin - self._origin, time.perf_counter() - begin))

    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._origin

    def duration_s(self, name: str) -> float:
        """Seconds that all steps of that name took together; 0 when there was none."""
        return sum(step.duration_s for step in self.steps if step.name == name)

    def to_dict(self) -> dict[str, float]:
        """Step name -> seconds, in the order in which the steps began, for `--json`."""
        ordered = sorted(self.steps, key=lambda step: step.begin_s)
        return {step.name: round(self.duration_s(step.name), 6) for step in ordered}
