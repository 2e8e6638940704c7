"""`torpor bench restore`: from nothing to the first response, booted and restored, interleaved."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torpor.bench.report import Report, host_parameters
from torpor.host.cancel import in_thread
from torpor.host.sparse import drop_page_cache
from torpor.image.spec import load_spec
from torpor.node.invoke import Request, send_request
from torpor.node.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from torpor.node.instance import Instance
    from torpor.node.node import Node
    from torpor.snapshot.local import LocalSnapshot

_NAME = "bench-restore"


async def bench_restore(node: Node, *, function: Path, runs: int) -> Report:
    """Each round: boot without snapshot, restore with warm and with dropped page cache.

    A sample runs from the beginning of the work to the last byte of the first response; slots
    come from a prepared pool in all cases. The function is deployed before and removed after.
    """
    spec = await in_thread(load_spec, function, name=_NAME)
    deployed = await node.deploy_spec(spec)
    snapshot = deployed.captured.snapshot
    report = Report(
        "restore", await in_thread(_parameters, node, snapshot, spec.memory_bytes, runs)
    )
    try:
        await _first_response(lambda: node.instances.restore(snapshot), node, spec.port)
        for _ in range(runs):
            report.add("cold_boot", await _cold_boot(node, function), "s")
            await in_thread(_warm, node, snapshot)
            report.add("local_warm", await _restored(node, snapshot, report, "local_warm"), "s")
            await in_thread(_drop, node, snapshot)
            report.add("local_cold", await _restored(node, snapshot, report, "local_cold"), "s")
    finally:
        await node.remove_function(_NAME)
    report.compare("cold_boot", "local_warm")
    report.compare("local_cold", "local_warm")
    return report


async def _cold_boot(node: Node, function: Path) -> float:
    spec = await in_thread(load_spec, function, name=_NAME)
    return await _first_response(lambda: node.start_cold(spec, Timeline()), node, spec.port)


async def _restored(node: Node, snapshot: LocalSnapshot, report: Report, name: str) -> float:
    timeline = Timeline()
    assert snapshot.manifest.function is not None
    duration_s = await _first_response(
        lambda: node.instances.restore(snapshot, timeline=timeline),
        node,
        snapshot.manifest.function.port,
    )
    for step, step_s in timeline.to_dict().items():
        report.add(f"{name} {step}", step_s, "s")
    return duration_s


async def _first_response(make: Callable[[], Awaitable[Instance]], node: Node, port: int) -> float:
    begin = time.perf_counter()
    instance = await make()
    try:
        await in_thread(
            send_request,
            instance.address,
            port,
            Request(),
            timeout_s=node.parts.settings.request_timeout_s,
        )
        return time.perf_counter() - begin
    finally:
        await node.instances.destroy(instance.id, vmm=instance.vmm)


def _files(node: Node, snapshot: LocalSnapshot) -> list[Path]:
    manifest = snapshot.manifest
    assert manifest.function is not None
    images = [node.parts.images.path(digest) for digest in (manifest.image, manifest.function.app)]
    return [snapshot.memory, snapshot.vmstate, snapshot.disk, *images]


def _drop(node: Node, snapshot: LocalSnapshot) -> None:
    for path in _files(node, snapshot):
        drop_page_cache(path)


def _warm(node: Node, snapshot: LocalSnapshot) -> None:
    for path in _files(node, snapshot):
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def _parameters(
    node: Node, snapshot: LocalSnapshot, memory_bytes: int, runs: int
) -> dict[str, object]:
    platform = snapshot.manifest.platform
    return {
        **host_parameters(),
        "vmm": f"{platform.vmm} {platform.vmm_version}",
        "accelerator": platform.accelerator,
        "memory_bytes": memory_bytes,
        "nonzero_bytes": snapshot.manifest.memory.data_bytes,
        "net_pool": node.parts.settings.net_pool,
        "runs": runs,
    }
