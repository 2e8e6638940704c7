"""`torpor bench clones`: what each further clone of a snapshot costs in memory, and its pause.

Private memory is what `/proc/PID/smaps_rollup` counts for the VMM's process alone, the proportional
set size less the part that others map too: guest pages that were written, and the VMM's own.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torpor.bench.report import Report, at_most, host_parameters
from torpor.host.cancel import in_thread
from torpor.image.spec import load_spec
from torpor.node.capture import capture
from torpor.node.invoke import Request, send_request

if TYPE_CHECKING:
    from torpor.node.live import Instance
    from torpor.node.node import Node
    from torpor.snapshot.local import LocalSnapshot

_NAME = "bench-clones"
_PAUSES_ALONE = 3
_CAPTURES = ("capture", "second capture")


async def bench_clones(
    node: Node, *, function: Path, runs: int, snapshot: LocalSnapshot | None = None
) -> Report:
    """`runs` clones beside a first one, each asked once; then each is paused, and captured.

    Series `private`, `written` (guest pages) and `rest`, their difference, in bytes; the `capture`
    pause of each clone with its steps, that of a `second capture`, for which its VMM has run the
    same code before, and `pause and resume` alone, the median of several before and after
    each. The first clone is captured before, for what is loaded once. The function is deployed
    before and removed after, if no snapshot of it is given.
    """
    deployed = snapshot is None
    if snapshot is None:
        spec = await in_thread(load_spec, function, name=_NAME)
        snapshot = (await node.deploy_spec(spec)).captured.snapshot
    platform = snapshot.manifest.platform
    parameters = {"vmm": platform.vmm, "accelerator": platform.accelerator, "runs": runs}
    report = Report("clones", {**host_parameters(), **parameters})
    clones: list[Instance] = []
    try:
        for _ in range(runs + 1):
            clones.append(await node.instances.restore(snapshot))
            await _ask(node, clones[-1])
        for clone in clones[1:]:
            await _count(clone, report)
        await _pause(node, clones[0], Report("unused", {}))
        for clone in clones[1:]:
            await _pause(node, clone, report)
    finally:
        for clone in clones:
            await node.instances.destroy(clone.id, vmm=clone.vmm)
        if deployed:
            await node.remove_function(_NAME)
    for name in _CAPTURES:
        report.compare(name, "pause and resume", at_most(3))
    return report


def count_private_bytes(pid: int) -> int:
    """Memory that only this process maps (proc(5), smaps_rollup). Raises ProcessLookupError."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


async def _ask(node: Node, clone: Instance) -> None:
    assert clone.function is not None
    timeout_s = node.parts.settings.request_timeout_s
    await in_thread(
        send_request, clone.address, clone.function.port, Request(), timeout_s=timeout_s
    )


async def _count(clone: Instance, report: Report) -> None:
    process = clone.vmm.process
    assert process is not None
    data = clone.directory / "written"
    private = await in_thread(count_private_bytes, process.pid)
    await clone.vmm.pause()
    written = (await clone.vmm.copy_written_memory(data)).size_bytes
    await clone.vmm.resume()
    data.unlink()
    report.add("private", private, "B")
    report.add("written", written, "B")
    report.add("rest", private - written, "B")


async def _pause(node: Node, clone: Instance, report: Report) -> None:
    alone = await time_pauses(clone)
    for name in _CAPTURES:
        captured = await capture(
            node.parts, clone, kind="instance", function=clone.function, then="resume"
        )
        report.add(name, captured.pause_s, "s")
        for step, step_s in captured.timeline.to_dict().items():
            report.add(f"{name} {step}", step_s, "s")
        await in_thread(node.parts.snapshots.remove, captured.snapshot.digest)
        alone += await time_pauses(clone)
    report.add("pause and resume", statistics.median(alone), "s")


async def time_pauses(clone: Instance) -> list[float]:
    """Seconds of a few pauses in which nothing happens."""
    times_s = []
    for _ in range(_PAUSES_ALONE):
        began = time.perf_counter()
        await clone.vmm.pause()
        await clone.vmm.resume()
        times_s.append(time.perf_counter() - began)
    return times_s
