"""`bench cycles` and `bench burst` with few functions: what they print; nothing grows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import EXAMPLES
from torpor.bench.burst import bench_burst
from torpor.bench.cycles import bench_cycles, slope

if TYPE_CHECKING:
    from torpor.node.node import Node

pytestmark = pytest.mark.vm


async def test_what_it_measures(node: Node) -> None:
    """A sample a round; descriptors and files do not grow with the rounds, no slot is in use."""
    report = await bench_cycles(node, function=EXAMPLES / "hello", runs=4, count=1)
    printed = json.loads(json.dumps(report.to_dict()))["series"]
    assert {name: len(one["samples"]) for name, one in printed.items()} == {
        "answer": 4,
        "asleep": 4,
        "resident": 4,
        "descriptors": 4,
        "threads": 4,
        "children": 4,
        "files": 4,
        "slots": 4,
        "rss slope": 1,
    }
    for name in ("descriptors", "files"):  # one may be open just now, a leak is one a round
        samples = printed[name]["samples"]
        assert min(samples[2:]) <= max(samples[:2]), name
    assert set(printed["slots"]["samples"]) == {0}
    assert "bench-0" not in {name for one in node.functions() for name in one.names}


async def test_what_burst_measures(node: Node) -> None:
    """The time of each answer and wake, the wakes in their order, and what it is promised of."""
    report = await bench_burst(node, function=EXAMPLES / "hello", runs=1, count=1)
    printed = json.loads(json.dumps(report.to_dict()))
    assert {name: len(one["samples"]) for name, one in printed["series"].items()} == {
        "alone answer": 10,
        "alone wake queued": 1,
        "alone wake": 1,
        "alone last answer": 1,
        "alone cpu each": 1,
        "burst answer": 10,
        "burst wake queued": 1,
        "burst wake": 1,
        "burst last answer": 1,
        "burst cpu each": 1,
    }
    assert printed["parameters"]["order of wakes, round 1"] == ["bench-0"]
    assert printed["promises"].keys() == {"burst cpu each/alone cpu each"}


def test_slope() -> None:
    """Of a line it is that of the line, whatever swings round it."""
    assert slope([float(3 * x + 100) for x in range(50)]) == pytest.approx(3)
    assert slope([100.0 + x % 2 for x in range(51)]) == pytest.approx(0, abs=0.01)
    assert slope([5.0]) == 0
