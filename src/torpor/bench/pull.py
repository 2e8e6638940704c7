"""`torpor bench pull`: a snapshot comes to a node that has nothing of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torpor.bench.arena import Arena, Sizes, arena
from torpor.bench.push import SERIES, WAYS
from torpor.bench.report import Report
from torpor.bench.subjects import Subjects, subjects_of
from torpor.bench.synthetic import guest_like, random_bytes, zero_bytes
from torpor.host.cancel import in_thread

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.bench.synthetic import Subject
    from torpor.node.node import Node
    from torpor.node.parts import Reporter


async def bench_pull(
    node: Node, *, function: Path, runs: int, minio: Path, vms: bool, sizes: Sizes
) -> Report:
    """Each round: a large snapshot beside the store, a function over the link in both ways.

    Every pull is eager and goes to a home of its own, with images, everything verified; what the
    store has is in its host's page cache. Without `vms` the function is made up.
    """
    async with subjects_of(node, function=function, generations=0, vms=vms, count=1) as subjects:
        return await in_thread(_measure, node, subjects, runs, minio, sizes)


def _measure(node: Node, subjects: Subjects | None, runs: int, minio: Path, sizes: Sizes) -> Report:
    say = node.parts.reporter
    with arena(node.parts.settings.home, minio=minio, needed_bytes=sizes.needed_bytes()) as place:
        given = subjects or Subjects.made_up(
            place.workspace.directory / "functions", sizes, count=1
        )
        report = Report("pull", {**place.parameters(sizes, runs), **given.parameters()})
        _peaks(place, report, sizes, say)
        say.say("pushing a snapshot to time")
        with place.synthetic(
            memory_bytes=sizes.rate_bytes, data_bytes=sizes.rate_bytes, content=guest_like()
        ) as bulk:
            place.push(bulk, "rate")
        for way in WAYS:
            place.push(given.functions[0], way, way=way)
        for number in range(runs):
            say.say(f"round {number + 1} of {runs}")
            _round(place, bulk, given.functions[0], report, number)
        report.compare("whole_file", "repository")
        report.parameters["load_at_end"] = [round(load, 1) for load in os.getloadavg()]
        return report


def _round(place: Arena, bulk: Subject, function: Subject, report: Report, number: int) -> None:
    got = place.pull(bulk, "rate")
    report.add("rate", got.raw_bytes / got.duration_s, "B/s")
    report.add("rate per CPU second", got.raw_bytes / got.cpu_s, "B/s")
    for way in WAYS if number % 2 else WAYS[::-1]:
        got = place.pull(function, way, way=way, shaped=True)
        report.add(SERIES[way], got.duration_s, "s")
        report.add(f"{SERIES[way]} bytes", got.bytes_down, "B")


def _peaks(place: Arena, report: Report, sizes: Sizes, say: Reporter) -> None:
    for name, content in (("random", random_bytes), ("zeros", zero_bytes)):
        say.say(f"pulling {sizes.peak_bytes >> 20} MiB of {name}")
        with place.synthetic(
            memory_bytes=sizes.peak_bytes, data_bytes=sizes.peak_bytes, content=content
        ) as subject:
            place.push(subject, f"peak-{name}")
        got = place.pull(subject, f"peak-{name}")
        report.add(f"peak {name}", got.peak_bytes, "B")
        if got.raw_bytes:
            report.add(f"rate {name}", got.raw_bytes / got.duration_s, "B/s")
        place.clear(f"peak-{name}")
