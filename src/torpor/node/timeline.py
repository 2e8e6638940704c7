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
    """One step: seconds from the timeline's beginning to the step's, and the step's own.

    `part_of` names the step that it happened in, or beside which another process did it; such a
    part is none of the timeline's own steps. Without `ended` it was still going on.
    """

    name: str
    begin_s: float
    duration_s: float
    part_of: str = ""
    ended: bool = True


@dataclass
class Timeline:
    """Steps by name; they may overlap. Belongs to one thread.

    Its clock is CLOCK_MONOTONIC, so what other processes measured can be laid on it.
    """

    _origin: float = field(default_factory=time.monotonic)
    steps: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the body; a body that raises is not recorded."""
        begin = time.monotonic()
        yield
        self.steps.append(Step(name, begin - self._origin, time.monotonic() - begin))

    def add_part(self, name: str, begin_s: float, end_s: float, *, of: str) -> None:
        """A part of a step, from moments of CLOCK_MONOTONIC; an `end_s` of 0 is still to come."""
        until_s = end_s or time.monotonic()
        self.steps.append(
            Step(name, begin_s - self._origin, until_s - begin_s, of, ended=bool(end_s))
        )

    @property
    def origin_s(self) -> float:
        """The beginning, as a moment of CLOCK_MONOTONIC."""
        return self._origin

    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._origin

    def seconds_to(self, moment_s: float) -> float:
        """From the beginning to a moment of CLOCK_MONOTONIC; negative for an earlier one."""
        return moment_s - self._origin

    def duration_s(self, name: str) -> float:
        """Seconds that all steps of that name took together; 0 when there was none."""
        return sum(s.duration_s for s in self.steps if s.name == name and not s.part_of)

    def to_dict(self) -> dict[str, float]:
        """Step name -> seconds, in the order in which the steps began, for `--json`."""
        own = [step for step in self.steps if not step.part_of]
        ordered = sorted(own, key=lambda step: step.begin_s)
        return {step.name: round(self.duration_s(step.name), 6) for step in ordered}
