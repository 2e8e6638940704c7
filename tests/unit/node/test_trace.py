"""The arithmetic of traces: timelines of two processes, counters before and after."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from torpor.node.timeline import Timeline
from torpor.node.trace import Paged, Trace, Windows, add_pager_steps, difference
from torpor.pager.spans import Spans
from torpor.units import Digest

DIGEST, OTHER = Digest("a" * 64), Digest("b" * 64)


def file_counters(scale: int) -> dict[str, Any]:
    """A file's counters as the pager answers them, all different."""
    return {
        "reads": 100 * scale,
        "zero": scale,
        "cache": 2 * scale,
        "store": 3 * scale,
        "pushed": 4 * scale,
        "awaited": 5 * scale,
        "stalled_s": {
            "zero": 0.5 * scale,
            "awaited": 0.125 * scale,
            "cache": 0.25 * scale,
            "store": 1.0 * scale,
        },
    }


def answer(*, pid: int, scale: int, requests: int, digest: Digest = DIGEST) -> dict[str, Any]:
    """What `PagerClient.counters` gives with one open snapshot of two files."""
    return {
        "pid": pid,
        "store": {"requests": requests, "bytes": requests * 1000},
        "snapshots": {
            digest: {
                "files": {"memory": file_counters(scale), "image": file_counters(scale)},
                "push": {"failure": "", "began_s": 0.0, "first_s": 0.0, "ended_s": 0.0},
                "hydrated_bytes": 7 * scale,
                "hydration": None,
            }
        },
    }


def test_counts_since_the_first_reading() -> None:
    """What was counted before is not this restore's; all files of the snapshot count together."""
    before = answer(pid=1, scale=1, requests=4)
    after = answer(pid=1, scale=3, requests=9)
    paged = difference(before, after, DIGEST)
    assert paged.classes == {
        "pushed": Windows(16, 0.0),
        "awaited": Windows(20, 0.5),
        "zero": Windows(4, 2.0),
        "cache": Windows(8, 1.0),
        "store": Windows(12, 4.0),
    }
    assert (paged.requests, paged.fetched_bytes, paged.hydrated_bytes) == (5, 5000, 14)


@pytest.mark.parametrize(
    "before",
    [{}, answer(pid=2, scale=9, requests=99)],
    ids=["no pager ran", "another pager ran"],
)
def test_counts_of_a_new_pager(before: dict[str, Any]) -> None:
    """A pager that began meanwhile counted from nothing, whatever the last one had counted."""
    paged = difference(before, answer(pid=1, scale=2, requests=3), DIGEST)
    assert paged.classes["store"] == Windows(12, 4.0)
    assert (paged.requests, paged.fetched_bytes) == (3, 3000)


def test_other_snapshots_do_not_count() -> None:
    """Windows of a snapshot that was open before are not mixed with those of this one."""
    before = answer(pid=1, scale=5, requests=4, digest=OTHER)
    paged = difference(before, answer(pid=1, scale=1, requests=5), DIGEST)
    assert paged.classes["zero"] == Windows(2, 1.0)
    assert paged.requests == 1


def test_pager_steps_lie_on_the_timeline() -> None:
    """Moments that another process measured are laid where they were, in order, as parts."""
    timeline, spans = Timeline(), Spans()
    with timeline.step("open"), spans.span("resolve"):
        pass
    for name, begin_s, end_s in spans.ended():
        timeline.add_part(name, begin_s, end_s, of="open")
    now_s = time.monotonic()
    push = {"began_s": now_s, "first_s": now_s + 0.25, "ended_s": now_s + 1.0, "failure": ""}
    add_pager_steps(timeline, {"push": push, "hydration": {"began_s": now_s, "ended_s": 0.0}})
    steps = {step.name: step for step in timeline.steps}
    opened, resolve = steps["open"], steps["resolve"]
    assert opened.begin_s <= resolve.begin_s
    assert resolve.begin_s + resolve.duration_s <= opened.begin_s + opened.duration_s
    assert steps["push"].duration_s == pytest.approx(1.0)
    assert steps["first window"].duration_s == pytest.approx(0.25)
    assert steps["push"].begin_s == pytest.approx(timeline.seconds_to(now_s))
    assert steps["push"].ended
    assert not steps["hydration"].ended
    assert timeline.to_dict().keys() == {"open"}


def test_push_of_an_earlier_wake_is_left_out() -> None:
    """A push that began before this restore did is none of its steps."""
    began_s = time.monotonic()
    timeline = Timeline()
    push = {"began_s": began_s - 1, "first_s": began_s - 0.5, "ended_s": began_s, "failure": ""}
    add_pager_steps(timeline, {"push": push})
    assert timeline.steps == []


def test_step_that_raises_is_no_span() -> None:
    """Neither a timeline nor the pager's spans record what failed."""
    timeline, spans = Timeline(), Spans()
    with pytest.raises(ValueError, match="no"), timeline.step("open"), spans.span("resolve"):
        raise ValueError("no")
    assert timeline.steps == []
    assert spans.ended() == []


def test_trace_is_plain_data() -> None:
    """A trace goes through JSON as it is."""
    timeline = Timeline()
    timeline.add_part("push", time.monotonic(), 0.0, of="pager")
    trace = Trace(tuple(timeline.steps), 0.5, Paged({"zero": Windows(1, 0.5)}, 10, 2, "", 0))
    data = json.loads(json.dumps(trace.to_dict()))
    assert data["ready_s"] == 0.5
    assert data["steps"][0]["part_of"] == "pager"
    assert data["steps"][0]["ended"] is False
    assert data["paged"]["classes"] == {"zero": {"windows": 1, "stalled_s": 0.5}}
