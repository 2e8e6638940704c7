"""`torpor bench burst`: many requests at once for many sleeping functions."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Final

from torpor.bench.asking import get
from torpor.bench.cpu import process_cpu_s
from torpor.bench.gateway import listening
from torpor.bench.report import Report, at_most, host_parameters
from torpor.bench.subjects import subjects_of
from torpor.gateway import Gateway

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.node.node import Node

_REQUESTS_EACH: Final = 10


async def bench_burst(node: Node, *, function: Path, runs: int, count: int = 20) -> Report:
    """Each round: ten requests for one sleeping function, then ten for each of `count` at once.

    Reported are the time of each answer, the wakes in their order, and the CPU seconds of VMMs and
    gateway for each function, alone and in the burst. Raises FunctionFailed when a request is lost.
    """
    report = Report(
        "burst",
        {
            **host_parameters(),
            "cpus": os.cpu_count(),
            "function": str(function),
            "functions": count,
            "requests": count * _REQUESTS_EACH,
            "wakes_at_once": node.parts.settings.gateway_wakes,
            "runs": runs,
        },
    )
    made = subjects_of(node, function=function, generations=0, vms=True, count=count)
    async with made as subjects:
        assert subjects is not None
        names = [s.snapshot.manifest.function.name for s in subjects.functions]  # type: ignore[union-attr]
        for number in range(runs):
            node.parts.reporter.say(f"round {number + 1} of {runs}")
            await _burst(report, node, names[:1], "alone")
            order = await _burst(report, node, names, "burst")
            report.parameters[f"order of wakes, round {number + 1}"] = order
    report.compare("burst cpu each", "alone cpu each", at_most(1.8))
    return report


async def _burst(report: Report, node: Node, names: list[str], label: str) -> list[str]:
    """Wake these functions by requests, put the samples down, stop them again; order of wakes."""
    async with listening(Gateway(node, node.parts.settings)) as gateway:
        own_s = time.process_time()
        asked = [
            get(gateway.address, f"/f/{name}/") for name in names for _ in range(_REQUESTS_EACH)
        ]
        times = await asyncio.gather(*asked)
        rows = node.parts.journal.instances()
        vmm_s = sum(process_cpu_s(row.vmm.pid) for row in rows if row.vmm and row.function in names)
        total_s = time.process_time() - own_s + vmm_s
        wakes = gateway.stats().recent_wakes
    await node.stop_all([row.id for row in rows if row.function in names])
    for seconds in times:
        report.add(f"{label} answer", seconds, "s")
    for wake in wakes:
        report.add(f"{label} wake queued", wake.queued_s, "s")
        report.add(f"{label} wake", wake.took_s, "s")
    report.add(f"{label} last answer", max(times), "s")
    report.add(f"{label} cpu each", total_s / len(names), "s")
    return [wake.function for wake in wakes]
