"""Benchmarks under real KVM, whose figures are what level 1 has; runs in level 1 only."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from fixtures.firecracker import vmm_settings
from fixtures.nodes import EXAMPLES, SESSION_HOME
from torpor.bench.clones import bench_clones
from torpor.bench.restore import bench_restore
from torpor.config import Settings, load_settings
from torpor.node.node import Node

if TYPE_CHECKING:
    from torpor.bench.report import Report

pytestmark = pytest.mark.vm

MOST_BESIDE_PAGES_BYTES = {"qemu": 30_000_000, "firecracker": 12_000_000}


async def test_clones() -> None:
    """A further clone costs what its guest wrote and little beside."""
    async with Node.open(settings()) as node:
        report = await bench_clones(node, function=EXAMPLES / "hello", runs=2)
    show(report)
    assert report.parameters["accelerator"] == "kvm"
    most = MOST_BESIDE_PAGES_BYTES[report.parameters["vmm"]]
    assert max(report.series["rest"].samples) <= most


async def test_restore() -> None:
    """`bench restore` tells the times from boot and from restores to the first response."""
    async with Node.open(settings()) as node:
        report = await bench_restore(node, function=EXAMPLES / "hello", runs=1, minio=None)
    show(report)
    assert report.parameters["accelerator"] == "kvm"
    assert {"cold_boot", "local_warm", "local_cold"} <= report.series.keys()


def settings() -> Settings:
    """The session's home, and the VMM that it is for."""
    return load_settings({"home": str(SESSION_HOME), **vmm_settings()}, environ={})


def show(report: Report) -> None:
    """Print a report: a failure shows it, and -rA shows all."""
    print(json.dumps(report.to_dict()))  # noqa: T201
