"""`torpor bench cycles`: functions that are woken by requests and sleep again, many times.

A daemon with its gateway runs in this process; what grows here, or on the host, is a leak.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.api.daemon import Daemon
from torpor.bench.report import Report, host_parameters
from torpor.bench.subjects import subjects_of
from torpor.errors import DeadlineExceeded, FunctionFailed
from torpor.gateway import Gateway
from torpor.host.cancel import in_thread
from torpor.snapshot.manifest import Scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.node.node import Node

_SCALE: Final = Scale(idle_ms=100)
_ASLEEP_WITHIN_S: Final = 120.0
_LOOK_AGAIN_S: Final = 0.02


async def bench_cycles(node: Node, *, function: Path, runs: int, count: int = 3) -> Report:
    """Each round: a request for each of `count` sleeping functions at once, then until all sleep.

    After each round are reported: the daemon's resident memory, descriptors, threads and children,
    the home's files, and its network slots that are in use. `rss slope` is the line through the
    memory of the last two thirds of the rounds. Raises FunctionFailed when a request is lost,
    DeadlineExceeded when a function does not fall asleep.
    """
    report = Report(
        "cycles",
        {**host_parameters(), "function": str(function), "functions": count, "runs": runs},
    )
    settings = dataclasses.replace(
        node.parts.settings, gateway_listen="127.0.0.1:0", api_listen="", drain="leave"
    )
    made = subjects_of(node, function=function, generations=0, vms=True, count=count, scale=_SCALE)
    async with made as subjects:
        assert subjects is not None
        names = [s.snapshot.manifest.function.name for s in subjects.functions]  # type: ignore[union-attr]
        async with Daemon.running(settings, lambda own: Gateway(own, settings)) as daemon:
            gateway = daemon.state.gateway()
            for number in range(runs):
                if not number % 10:
                    node.parts.reporter.say(f"round {number + 1} of {runs}")
                await _cycle(report, node, gateway, names)
            await daemon.drain()
    resident = report.series["resident"].samples
    report.add("rss slope", slope(resident[len(resident) // 3 :]), "KiB/round")
    return report


def slope(samples: Sequence[float]) -> float:
    """How much a line through samples, one a round, rises each round; 0 for less than two."""
    if len(samples) < 2:
        return 0.0
    return float(statistics.linear_regression(range(len(samples)), samples).slope)


async def _cycle(report: Report, node: Node, gateway: str, names: Sequence[str]) -> None:
    for seconds in await asyncio.gather(*(_ask(gateway, name) for name in names)):
        report.add("answer", seconds, "s")
    began = time.perf_counter()
    while rows := await in_thread(node.parts.journal.instances):
        if time.perf_counter() - began > _ASLEEP_WITHIN_S:
            raise DeadlineExceeded(f"{len(rows)} instances do not fall asleep")
        await asyncio.sleep(_LOOK_AGAIN_S)
    report.add("asleep", time.perf_counter() - began, "s")
    for name, value, unit in await in_thread(_look, node):
        report.add(name, value, unit)


def _look(node: Node) -> list[tuple[str, float, str]]:
    home = node.parts.settings.home
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    slots = [r for r in node.parts.slots.list() if r.home == str(home) and r.state != "free"]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [
        ("resident", int(status["VmRSS"].split()[0]), "KiB"),
        ("descriptors", len(os.listdir("/proc/self/fd")), ""),
        ("threads", int(status["Threads"]), ""),
        ("children", len(children), ""),
        ("files", sum(len(files) for _, _, files in os.walk(home)), ""),
        ("slots", len(slots), ""),
    ]


async def _ask(gateway: str, name: str) -> float:
    """One request on a connection of its own; the seconds to the end of its answer."""
    began = time.perf_counter()
    host, _, port = gateway.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"GET /f/%b/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % name.encode())
        answer = await reader.read()
    finally:
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise FunctionFailed(f"{name} did not answer", reason=answer[:500].decode("latin-1"))
    return time.perf_counter() - began
