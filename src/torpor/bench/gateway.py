"""`torpor bench gateway`: a function reached directly and through the gateway, interleaved.

The gateway runs in this process, wrk and the stub in others.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.bench.report import Report, at_least, at_most, host_parameters
from torpor.errors import NotFound, ProgramFailed
from torpor.gateway import Gateway
from torpor.gateway.fleet import Deployed, Ready, View, Woken
from torpor.host.cancel import in_thread
from torpor.host.process import run
from torpor.image.spec import load_spec
from torpor.snapshot.manifest import Scale
from torpor.units import GiB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from torpor.node.node import Node

_NAME: Final = "bench-gateway"
_SCALE: Final = Scale(concurrency=256, max=1, idle_ms=3_600_000)
_SECONDS: Final = 3
_GROWS_MB: Final = 16.0
_CONNECTIONS: Final = (1, 16)
_LATENCY: Final = re.compile(r"^ +(50|90|99)% +([0-9.]+)(us|ms|s) *$", re.MULTILINE)
_RATE: Final = re.compile(r"^Requests/sec: +([0-9.]+)$", re.MULTILINE)
_TO_MS: Final = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclasses.dataclass(frozen=True)
class StubFleet:
    """A Fleet of one function that always runs, at a port of loopback."""

    port: int

    async def view(self) -> View:
        """See Fleet."""
        ready = Ready(_NAME, _NAME, "stub", "127.0.0.1", self.port)
        return View({_NAME: Deployed(_SCALE, "stub")}, [ready])

    def changed(self) -> bool:
        """See Fleet."""
        return False

    async def find_elsewhere(self, name: str) -> bool:
        """See Fleet."""
        return False

    async def wake(self, name: str) -> Woken:
        """See Fleet: there is nothing to wake."""
        raise NotFound(f"the stub is no {name}")

    async def stop(self, instance_id: str) -> None:
        """See Fleet: it ends with the benchmark."""

    async def refresh(self, instance_id: str) -> None:
        """See Fleet: there is nothing to refresh."""


async def bench_gateway(
    node: Node,
    *,
    function: Path,
    runs: int,
    vm: bool,
    stream_bytes: int = GiB,
    seconds: int = _SECONDS,
) -> Report:
    """Each round: wrk with 1 and 16 connections on the function directly, then by the gateway.

    Then a long body by the gateway, each way. The function is a stub on loopback, or with `vm` a
    deployed one in a real VM; long bodies are always the stub's. Raises HostUnfit without wrk.
    """
    report = Report(
        "gateway",
        {
            **host_parameters(),
            "cpus": os.cpu_count(),
            "function": str(function) if vm else "stub",
            "seconds": seconds,
            "runs": runs,
            "load_at_begin": [round(load, 1) for load in os.getloadavg()],
        },
    )
    with stub() as port:
        target = _deployed(node, function) if vm else _stubbed(node, port)
        async with target as (gateway, direct):
            for number in range(runs):
                node.parts.reporter.say(f"round {number + 1} of {runs}")
                await _round(report, gateway, direct, seconds)
        async with _stubbed(node, port) as (gateway, _):
            node.parts.reporter.say("streaming a long body, each way")
            await _stream(report, gateway, stream_bytes)
    for connections in _CONNECTIONS:
        report.compare(f"gateway c{connections} rate", f"direct c{connections} rate")
    report.promises["stream rss grown"] = at_most(_GROWS_MB)
    if not vm:  # a function in an emulated VM takes longer than all that is promised here
        report.promises["added p50"] = at_most(1.5)
        report.promises[f"gateway c{_CONNECTIONS[-1]} rate"] = at_least(1500)
    return report


@contextlib.contextmanager
def stub() -> Iterator[int]:
    """The stub as a process, gone after the body; its port. Blocks until it listens."""
    command = [sys.executable, "-m", "torpor.bench.stub", "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            yield int(child.stdout.readline())
        finally:
            child.kill()


@contextlib.asynccontextmanager
async def _stubbed(node: Node, port: int) -> AsyncIterator[tuple[Gateway, str]]:
    async with listening(Gateway(StubFleet(port), node.parts.settings)) as gateway:
        yield gateway, f"http://127.0.0.1:{port}/"


@contextlib.asynccontextmanager
async def _deployed(node: Node, function: Path) -> AsyncIterator[tuple[Gateway, str]]:
    spec = await in_thread(load_spec, function, name=_NAME)
    try:
        await node.deploy_spec(dataclasses.replace(spec, scale=_SCALE))
        instance = await node.restore(_NAME)
        async with listening(Gateway(node, node.parts.settings)) as gateway:
            yield gateway, f"http://{instance.address}:{spec.port}/"
    finally:
        if node.parts.journal.ref(_NAME) is not None:
            await node.remove_function(_NAME)


@contextlib.asynccontextmanager
async def listening(gateway: Gateway) -> AsyncIterator[Gateway]:
    """A gateway that listens on a free port of loopback during the body."""
    await gateway.start(host="127.0.0.1", port=0)
    try:
        yield gateway
    finally:
        await gateway.drain(deadline_s=5)


async def _round(report: Report, gateway: Gateway, direct: str, seconds: int) -> None:
    host, port = gateway.address
    through = f"http://{host}:{port}/f/{_NAME}/"
    for connections in _CONNECTIONS:
        for way, url in (("direct", direct), ("gateway", through)):
            text = await in_thread(_wrk, url, connections, seconds)
            prefix = f"{way} c{connections}"
            for name, value, unit in _read_wrk(text):
                report.add(f"{prefix} {name}", value, unit)
    alone = f"c{_CONNECTIONS[0]} p50"
    added_ms = report.series[f"gateway {alone}"].samples[-1]
    report.add("added p50", added_ms - report.series[f"direct {alone}"].samples[-1], "ms")


def _wrk(url: str, connections: int, seconds: int) -> str:
    text = run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", url],
        timeout_s=seconds + 30,
        hint="`make setup` installs wrk",
    )
    if "Non-2xx" in text or "Socket errors" in text:
        raise ProgramFailed(f"not all requests to {url} were answered", reason=text)
    return text


def _read_wrk(text: str) -> list[tuple[str, float, str]]:
    found = [
        (f"p{percent}", float(value) * _TO_MS[unit], "ms")
        for percent, value, unit in _LATENCY.findall(text)
    ]
    rate = _RATE.search(text)
    if rate is None or len(found) != 3:
        raise ProgramFailed("wrk printed no latencies", reason=text)
    return [*found, ("rate", float(rate[1]), "1/s")]


async def _stream(report: Report, gateway: Gateway, size_bytes: int) -> None:
    """A body as long as that from the function, and one to it."""
    before = most = rss_bytes()
    for series, way, path in (
        ("stream", "fetch", f"stream/{size_bytes}"),
        ("stream up", "send", "taken"),
    ):
        host, port = gateway.address
        command = [sys.executable, "-m", "torpor.bench.stub", way]
        words = [*command, host, str(port), f"/f/{_NAME}/{path}", str(size_bytes)]
        moving = asyncio.ensure_future(in_thread(run, words, timeout_s=300))
        while not moving.done():
            await asyncio.wait((moving,), timeout=0.05)
            most = max(most, rss_bytes())
        report.add(series, size_bytes / float(await moving) / 1e6, "MB/s")
    report.add("stream rss before", before / 1e6, "MB")
    report.add("stream rss most", most / 1e6, "MB")
    report.add("stream rss grown", (most - before) / 1e6, "MB")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
