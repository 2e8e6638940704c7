"""`torpor bench pause`: how long an instance stands still while it is snapshotted."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING

from torpor.bench.clones import time_pauses
from torpor.bench.report import Report, at_most, host_parameters
from torpor.host import pagemap
from torpor.host.cancel import in_thread
from torpor.image.spec import load_spec
from torpor.node.capture import capture
from torpor.node.invoke import Request, send_request
from torpor.units import GiB, MiB

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.node.node import Node
    from torpor.snapshot.local import LocalSnapshot
    from torpor.vmm.interface import Vmm

_SIZES = {"256MiB": 256 * MiB, "1GiB": GiB}
_REQUESTS = 2


async def bench_pause(node: Node, *, function: Path, runs: int) -> Report:
    """Each round, for each memory size: restore, two requests, snapshot.

    The written pages are about the same in both sizes (series `written`); what remains is what
    memory size itself costs. `alone` is a pause in which nothing happens: the median of several
    before and after. `scan ioctl` and `scan reading` are the two ways to find those pages, timed
    on the same running VM.
    """
    spec = await in_thread(load_spec, function)
    snapshots: dict[str, LocalSnapshot] = {}
    names = {size: f"bench-pause-{size.lower()}" for size in _SIZES}
    report = Report("pause", {**host_parameters(), "requests": _REQUESTS, "runs": runs})
    try:
        for size, memory_bytes in _SIZES.items():
            sized = dataclasses.replace(spec, name=names[size], memory_bytes=memory_bytes)
            snapshots[size] = (await node.deploy_spec(sized)).captured.snapshot
        for _ in range(runs):
            for size, snapshot in snapshots.items():
                await _sample(node, snapshot, size, report)
    finally:
        for size in snapshots:
            await node.remove_function(names[size])
    report.compare("1GiB", "256MiB")
    report.compare("256MiB", "alone 256MiB", at_most(3))
    report.compare("scan reading 1GiB", "scan ioctl 1GiB")
    return report


async def _sample(node: Node, snapshot: LocalSnapshot, size: str, report: Report) -> None:
    instance = await node.instances.restore(snapshot)
    try:
        assert instance.function is not None
        for _ in range(_REQUESTS):
            await in_thread(
                send_request,
                instance.address,
                instance.function.port,
                Request(),
                timeout_s=node.parts.settings.request_timeout_s,
            )
        await in_thread(_time_scans, instance.vmm, snapshot, size, report)
        alone = await time_pauses(instance)
        captured = await capture(
            node.parts, instance, kind="instance", function=instance.function, then="resume"
        )
        alone += await time_pauses(instance)
    finally:
        await node.instances.destroy(instance.id, vmm=instance.vmm)
    report.add(size, captured.pause_s, "s")
    report.add(f"alone {size}", statistics.median(alone), "s")
    report.add(f"written {size}", captured.written_bytes, "B")
    for step, step_s in captured.timeline.to_dict().items():
        report.add(f"{step} {size}", step_s, "s")
    await in_thread(node.parts.snapshots.remove, captured.snapshot.digest)


def _time_scans(vmm: Vmm, snapshot: LocalSnapshot, size: str, report: Report) -> None:
    assert vmm.process is not None
    pid = vmm.process.pid
    mapping = pagemap.find_mapping(pid, snapshot.memory)
    begin = time.perf_counter()
    pagemap.find_written(pid, mapping)
    middle = time.perf_counter()
    for _ in pagemap.scan_by_reading(pid, mapping):
        pass
    end = time.perf_counter()
    report.add(f"scan ioctl {size}", middle - begin, "s")
    report.add(f"scan reading {size}", end - middle, "s")
