"""`torpor bench push`: what a push sends, asks for, takes, and how fast it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from torpor.bench.arena import Arena, Sizes, arena, ref_of
from torpor.bench.report import Report
from torpor.bench.subjects import Subjects, subjects_of
from torpor.bench.synthetic import guest_like, random_bytes, zero_bytes
from torpor.host.cancel import in_thread

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.bench.synthetic import Subject
    from torpor.bench.transfer import Outcome, Way
    from torpor.node.node import Node
    from torpor.node.parts import Reporter

WAYS: Final[tuple[Way, Way]] = ("whole", "repository")
SERIES: Final = {"whole": "whole_file", "repository": "repository"}


async def bench_push(
    node: Node, *, function: Path, runs: int, minio: Path, vms: bool, sizes: Sizes
) -> Report:
    """Each round, into stores that are empty: a function, again, a second, ten, each alone.

    The first and the second are sent over the link in both ways. Bytes are those that travelled
    in both directions; rates are of window content, on the store's own host. Without `vms` the
    functions are made up, and there is no `generation_bytes`.
    """
    async with subjects_of(node, function=function, generations=runs, vms=vms) as subjects:
        return await in_thread(_measure, node, subjects, runs, minio, sizes)


def _measure(node: Node, subjects: Subjects | None, runs: int, minio: Path, sizes: Sizes) -> Report:
    say = node.parts.reporter
    with arena(node.parts.settings.home, minio=minio, needed_bytes=sizes.needed_bytes()) as place:
        given = subjects or Subjects.made_up(place.workspace.directory / "functions", sizes)
        report = Report("push", {**place.parameters(sizes, runs), **given.parameters()})
        if not given.generations:
            report.parameters["left_out"] = "generation_bytes: it takes VMs"
        _peaks(place, report, sizes, say)
        say.say("making a snapshot to time")
        with place.synthetic(
            memory_bytes=sizes.rate_bytes, data_bytes=sizes.rate_bytes, content=guest_like()
        ) as bulk:
            if given.generations:
                place.push(given.functions[0], "generations")
            for number in range(runs):
                say.say(f"round {number + 1} of {runs}")
                _rate(place, bulk, report)
                _functions(place, given.functions, report, number)
                if given.generations:
                    sent = place.push(given.generations[number], "generations")
                    report.add("generation_bytes", _travelled(sent), "B")
        for above, below in (
            ("unchanged", "first"),
            ("second", "first"),
            ("ten", "alone"),
            ("whole_file", "repository"),
            ("whole_file second", "repository second"),
        ):
            report.compare(above, below)
        report.parameters["load_at_end"] = [round(load, 1) for load in os.getloadavg()]
        return report


def _peaks(place: Arena, report: Report, sizes: Sizes, say: Reporter) -> None:
    for name, content in (("random", random_bytes), ("zeros", zero_bytes)):
        say.say(f"pushing {sizes.peak_bytes >> 20} MiB of {name}")
        with place.synthetic(
            memory_bytes=sizes.peak_bytes, data_bytes=sizes.peak_bytes, content=content
        ) as subject:
            sent = place.push(subject, f"peak-{name}")
        report.add(f"peak {name}", sent.peak_bytes, "B")
        if sent.raw_bytes:
            report.add(f"rate {name}", sent.raw_bytes / sent.duration_s, "B/s")
        place.clear(f"peak-{name}")


def _rate(place: Arena, bulk: Subject, report: Report) -> None:
    sent = place.push(bulk, "rate")
    place.clear("rate")
    report.add("rate", sent.raw_bytes / sent.duration_s, "B/s")
    report.add("rate per CPU second", sent.raw_bytes / sent.cpu_s, "B/s")
    report.add("rate stored/raw", sent.bytes_up / sent.raw_bytes, "1")


def _functions(place: Arena, functions: list[Subject], report: Report, number: int) -> None:
    ways = WAYS if number % 2 else WAYS[::-1]
    for way in ways:
        sent = place.push(functions[0], way, way=way, shaped=True)
        report.add(SERIES[way], sent.duration_s, "s")
        if way == "repository":
            _count(report, "first", sent)
    _count(report, "unchanged", place.push(functions[0], "repository"))
    alone = place.stored_bytes("repository")
    for way in ways:
        sent = place.push(functions[1], way, way=way, shaped=True)
        report.add(f"{SERIES[way]} second", sent.duration_s, "s")
        if way == "repository":
            _count(report, "second", sent)
    for subject in functions[2:]:
        place.push(subject, "repository")
    report.add("ten", place.stored_bytes("repository"), "B")
    for way in ways:
        place.clear(way)
    for subject in functions[1:]:
        place.push(subject, f"alone/{ref_of(subject)}")
    report.add("alone", alone + place.stored_bytes("alone"), "B")
    place.clear("alone")


def _count(report: Report, name: str, outcome: Outcome) -> None:
    report.add(name, _travelled(outcome), "B")
    report.add(f"{name} requests", sum(outcome.requests.values()), "requests")
    for kind, count in outcome.requests.items():
        report.add(f"{name} requests {kind}", count, "requests")


def _travelled(outcome: Outcome) -> int:
    return outcome.bytes_up + outcome.bytes_down
