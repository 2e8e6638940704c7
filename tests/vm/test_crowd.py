"""`bench crowd` in a tiny size: what it prints, what it promises, and that nothing is left."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from fixtures.minio import BINARY
from fixtures.nodes import EXAMPLES
from torpor.bench import crowd
from torpor.bench.crowd import bench_crowd
from torpor.errors import DeadlineExceeded
from torpor.host.process import find_processes_in

if TYPE_CHECKING:
    from torpor.node.node import Node

pytestmark = [
    pytest.mark.vm,
    pytest.mark.minio,
    pytest.mark.skipif(not BINARY.exists(), reason="there is no MinIO; `make setup-test`"),
]


async def test_what_it_measures(node: Node) -> None:
    """Each crowd has its samples as one JSON object; clones fetch little more than one."""
    report = await bench_crowd(
        node, function=EXAMPLES / "hello", runs=1, minio=BINARY, clones=3, functions=2
    )
    printed = json.loads(json.dumps(report.to_dict()))
    assert printed["scenario"] == "crowd"
    counts = {name: len(series["samples"]) for name, series in printed["series"].items()}
    assert {name: count for name, count in counts.items() if count != 1} == {
        "clones answer": 3,
        "functions answer": 2,
    }
    least = {name: min(series["samples"]) for name, series in printed["series"].items()}
    on_demand = {f"{label} bytes on demand" for label in ("one", "clones", "functions")}
    assert {name for name, sample in least.items() if sample <= 0} <= on_demand  # none: all pushed
    assert printed["promises"]["clones bytes/one bytes"]["holds"]
    assert printed["promises"]["functions cpu each/one cpu each"]["bound"] == "at most 1.6"
    home = node.parts.settings.home
    assert not list((home / "bench").iterdir())
    assert find_processes_in(home / "bench") == []


async def test_a_crowd_that_does_not_answer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wakes that wait for ever are an error that counts them, and leave nothing."""

    async def never(address: tuple[str, int], path: str) -> float:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    monkeypatch.setattr(crowd, "get", never)
    monkeypatch.setattr(crowd, "_WITHIN_S", 5.0)
    with pytest.raises(DeadlineExceeded, match="1 of 1 wakes"):
        await bench_crowd(
            node, function=EXAMPLES / "hello", runs=1, minio=BINARY, clones=1, functions=1
        )
    assert not list((node.parts.settings.home / "bench").iterdir())
