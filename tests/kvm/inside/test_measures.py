"""Benchmarks under real KVM, whose figures are what level 1 has; runs in level 1 only."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import EXAMPLES
from torpor.bench.clones import bench_clones
from torpor.bench.restore import bench_restore

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.bench.report import Report
    from torpor.node.node import Node
    from torpor.snapshot.local import LocalSnapshot

pytestmark = pytest.mark.vm

CLONES = ("private", "written", "rest", "capture", "second capture", "pause and resume")
MOST_BESIDE_PAGES_BYTES = {"qemu": 20_000_000, "firecracker": 12_000_000}


async def test_clones(node: Node, record_property: Callable[[str, str], None]) -> None:
    """A further clone costs what its guest wrote and little beside."""
    report = await bench_clones(
        node, function=EXAMPLES / "ledger", runs=1, snapshot=await deployed_snapshot(node)
    )
    record_property("measured", tell(report, *CLONES))
    assert report.parameters["accelerator"] == "kvm"
    most = MOST_BESIDE_PAGES_BYTES[report.parameters["vmm"]]
    assert max(report.series["rest"].samples) <= most


async def test_restore(node: Node, record_property: Callable[[str, str], None]) -> None:
    """`bench restore` tells the times from boot and from restores to the first response."""
    report = await bench_restore(
        node,
        function=EXAMPLES / "ledger",
        runs=1,
        minio=None,
        snapshot=await deployed_snapshot(node),
    )
    record_property("measured", tell(report, "cold_boot", "local_warm", "local_cold"))
    assert report.parameters["accelerator"] == "kvm"
    assert {"cold_boot", "local_warm", "local_cold"} <= report.series.keys()
    assert report.series["local_warm"].samples[0] < report.series["cold_boot"].samples[0]


async def deployed_snapshot(node: Node) -> LocalSnapshot:
    """The session's own: a deploy of another takes a minute here."""
    return (await node.inspect("ledger")).snapshot


def tell(report: Report, *names: str) -> str:
    """One line with the medians of these series; all of the report is in the test's output."""
    print(json.dumps(report.to_dict()))  # noqa: T201
    medians = []
    for name in names:
        series = report.series[name]
        median = statistics.median(series.samples)
        shown = f"{median:.3g} s" if series.unit == "s" else f"{median / 1e6:.1f} MB"
        medians.append(f"{name} {shown}")
    return f"{report.parameters['vmm']}, {report.scenario}: {', '.join(medians)}"
