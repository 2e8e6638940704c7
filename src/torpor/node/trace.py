"""Where the time of one restore went, and which windows it needed from where.

The pager counts since it began and for all its instances; a restore's numbers are what was counted
between two readings. Restores of the same node at the same time are in each other's numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from torpor.node.timeline import Step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torpor.node.paging import Paging
    from torpor.node.timeline import Timeline
    from torpor.snapshot.local import LocalSnapshot
    from torpor.units import Digest

_PUSH_WAIT_S: Final = 20.0
CLASSES: Final = {
    "pushed": "pushed",
    "awaited": "just being pushed",
    "zero": "zero",
    "cache": "chunk cache",
    "store": "bucket",
}
"""The classes of windows as the pager counts them, and what people read."""


@dataclass(frozen=True)
class Windows:
    """The windows of one class, and how long readers stood still for them.

    A read is counted where its slowest window was; nobody waits for what was pushed.
    """

    windows: int
    stalled_s: float


@dataclass(frozen=True)
class Paged:
    """What the pager did for one restore: windows by class, and what it asked of the store.

    `fetched_bytes` and `requests` are all that was asked: refs, records, wake object and chunks,
    repeated requests too.
    """

    classes: Mapping[str, Windows]
    fetched_bytes: int
    requests: int
    push_failure: str
    hydrated_bytes: int


@dataclass(frozen=True)
class Trace:
    """A restore taken apart: its steps and their parts by begin, and what was paged.

    `ready_s`: seconds from the beginning until the instance was ready. `paged` is None when the
    snapshot's files were on the node.
    """

    steps: tuple[Step, ...]
    ready_s: float
    paged: Paged | None

    def to_dict(self) -> dict[str, Any]:
        """The trace for `--json`, times in seconds."""
        paged = None if self.paged is None else asdict(self.paged)
        return {
            "ready_s": self.ready_s,
            "steps": [asdict(step) for step in self.steps],
            "paged": paged,
        }


def trace_of(data: Mapping[str, Any]) -> Trace:
    """The trace that `to_dict` gave."""
    paged = data["paged"]
    if paged is not None:
        classes = {name: Windows(**counted) for name, counted in paged["classes"].items()}
        paged = Paged(**{**paged, "classes": classes})
    return Trace(tuple(Step(**step) for step in data["steps"]), data["ready_s"], paged)


class Tracer:
    """Reads the pager's counters before and after one restore. Blocking; any thread."""

    def __init__(self, paging: Paging) -> None:
        self._client = paging.client
        self._before = self._client.counters() if self._client.is_running() else {}

    def finish(self, snapshot: LocalSnapshot, timeline: Timeline, *, ready_s: float) -> Trace:
        """The trace, after the push of the working set has ended or was waited for.

        Hydration is not waited for.
        """
        paged = None
        if snapshot.served is not None:
            self._client.wait_pushed(snapshot.digest, timeout_s=_PUSH_WAIT_S)
            after = self._client.counters()
            add_pager_steps(timeline, after["snapshots"].get(snapshot.digest, {}))
            paged = difference(self._before, after, snapshot.digest)
        steps = sorted(timeline.steps, key=lambda step: step.begin_s)
        return Trace(tuple(steps), ready_s, paged)


def add_pager_steps(timeline: Timeline, counted: Mapping[str, Any]) -> None:
    """Lay push and hydration of one snapshot on a timeline; older ones are none of its own."""
    push = counted.get("push")
    if push and timeline.seconds_to(push["began_s"]) >= 0:
        timeline.add_part("push", push["began_s"], push["ended_s"], of="pager")
        if push["first_s"]:
            timeline.add_part("first window", push["began_s"], push["first_s"], of="push")
    hydration = counted.get("hydration")
    if hydration and timeline.seconds_to(hydration["began_s"]) >= 0:
        timeline.add_part("hydration", hydration["began_s"], hydration["ended_s"], of="pager")


def difference(before: Mapping[str, Any], after: Mapping[str, Any], digest: Digest) -> Paged:
    """What was counted for a snapshot between two answers of `PagerClient.counters`.

    A pager that was replaced in between counted anew: all that it counted is taken.
    """
    if before.get("pid") != after["pid"]:
        before = {}
    old, new = _counted(before, digest), _counted(after, digest)
    asked, had = after["store"], before.get("store", {"bytes": 0, "requests": 0})
    classes = {
        name: Windows(
            _windows(new, name) - _windows(old, name), _stalled_s(new, name) - _stalled_s(old, name)
        )
        for name in CLASSES
    }
    return Paged(
        classes,
        asked["bytes"] - had["bytes"],
        asked["requests"] - had["requests"],
        (new.get("push") or {}).get("failure", ""),
        new.get("hydrated_bytes", 0) - old.get("hydrated_bytes", 0),
    )


def _counted(counters: Mapping[str, Any], digest: Digest) -> Mapping[str, Any]:
    found: Mapping[str, Any] = counters.get("snapshots", {}).get(digest, {})
    return found


def _windows(counted: Mapping[str, Any], name: str) -> int:
    return sum(int(file[name]) for file in counted.get("files", {}).values())


def _stalled_s(counted: Mapping[str, Any], name: str) -> float:
    files = counted.get("files", {}).values()
    return float(sum(file["stalled_s"].get(name, 0.0) for file in files))
