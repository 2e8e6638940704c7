"""`bench gateway` in a tiny size: what it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from torpor.bench.gateway import bench_gateway
from torpor.config import Settings
from torpor.node.node import Node
from torpor.units import MiB

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host


async def test_what_it_measures(tmp_path: Path) -> None:
    """Each percentile and rate, direct and by the gateway; what is promised is among them."""
    async with Node.open(Settings(home=tmp_path / "home")) as node:
        report = await bench_gateway(
            node, function=tmp_path, runs=1, vm=False, seconds=1, stream_bytes=64 * MiB
        )
    printed = json.loads(json.dumps(report.to_dict()))
    series = printed["series"]
    for way in ("direct", "gateway"):
        for connections in (1, 16):
            for what in ("p50", "p90", "p99", "rate"):
                assert series[f"{way} c{connections} {what}"]["samples"][0] > 0
    assert min(series["stream"]["samples"] + series["stream up"]["samples"]) > 0
    promised = {"added p50", "gateway c16 rate", "stream rss grown"}
    assert printed["promises"].keys() == promised <= series.keys()
