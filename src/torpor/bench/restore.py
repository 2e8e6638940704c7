"""`torpor bench restore`: from nothing to the first response, booted and restored, interleaved."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Final

from torpor.bench.remote import add_remote_round, remote_store
from torpor.bench.report import Report, Spread, at_least, at_most, host_parameters
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.host.sparse import drop_page_cache
from torpor.image.spec import load_spec
from torpor.node.invoke import Request, send_request
from torpor.node.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from torpor.bench.remote import Remote
    from torpor.image.spec import FunctionSpec
    from torpor.node.live import Instance
    from torpor.node.node import Node
    from torpor.snapshot.local import LocalSnapshot

_NAME = "bench-restore"
_REMOTE_COLD: Final = {"hello": at_most(1.5), "ledger": at_most(2.0), "thumbs": at_most(2.0)}
_WHOLE_FILE: Final = dict.fromkeys(_REMOTE_COLD, at_least(5))
_FETCHED_SHARE: Final = "first_response_bytes/nonzero_bytes"


async def bench_restore(
    node: Node,
    *,
    function: Path,
    runs: int,
    minio: Path | None,
    cold: bool = True,
    snapshot: LocalSnapshot | None = None,
) -> Report:
    """Each round: boot without snapshot, restore with warm and with dropped page cache, and remote.

    A sample runs from the beginning of the work to the last byte of the first response; a slot is
    ready in the pool before each, and remote nodes have their pager running. The function is
    deployed before and removed after, if no snapshot of it is given. Without `minio` nothing is
    remote; without `cold` nothing is booted. `whole_file` moves every byte of the memory file, as
    systems do that know no more of it, `whole_sparse` leaves its holes out; both in ranges of
    8 MiB, four of each file side by side.
    """
    spec = await in_thread(load_spec, function, name=_NAME)
    deployed = snapshot is None
    if snapshot is None:
        snapshot = (await node.deploy_spec(spec)).captured.snapshot
    report = Report(
        "restore", await in_thread(_parameters, node, snapshot, spec.memory_bytes, runs)
    )
    request = _request_of(spec)
    others = await in_thread(node.parts.slots.count_free)
    try:
        async with contextlib.AsyncExitStack() as stack:
            remote = None
            if minio is not None:
                remote = await stack.enter_async_context(
                    entered_in_thread(_remote(node, minio, snapshot, request))
                )
            await _first_response(lambda: node.instances.restore(snapshot), node, spec, request)
            for number in range(runs):
                node.parts.reporter.say(f"round {number + 1} of {runs}")
                await _round(node, spec, snapshot, report, request, cold=cold)
                if remote is not None:
                    await add_remote_round(report, remote, node.parts.settings)
            if remote is not None:
                stored = await in_thread(remote.stored_bytes, node.parts.settings)
                report.parameters["nonzero_stored_bytes"] = stored
                fetched = report.series["remote_cold fetched"].samples
                share = Spread.of([size / stored for size in fetched])
                report.ratios[_FETCHED_SHARE] = share
                report.promises[_FETCHED_SHARE] = at_most(0.35)
    finally:
        if deployed:
            await node.remove_function(_NAME)
        if not node.parts.settings.net_pool:
            await in_thread(node.parts.slots.prune, keep=others)
    if cold:
        report.compare("cold_boot", "local_warm", at_least(15))
    report.compare("local_cold", "local_warm")
    if minio is not None:
        report.compare("remote_cold", "local_warm", _REMOTE_COLD.get(function.name))
        report.compare("whole_file", "remote_cold", _WHOLE_FILE.get(function.name))
        report.compare("whole_sparse", "remote_cold")
        report.compare("no_working_set", "remote_cold")
    return report


async def _round(
    node: Node,
    spec: FunctionSpec,
    snapshot: LocalSnapshot,
    report: Report,
    request: Request,
    *,
    cold: bool,
) -> None:
    """One sample of each way to wake on the node itself."""
    if cold:
        make = lambda: node.start_cold(spec, Timeline())  # noqa: E731
        report.add("cold_boot", await _first_response(make, node, spec, request), "s")
    for name, prepare in (("local_warm", _warm), ("local_cold", _drop)):
        await in_thread(prepare, node, snapshot)
        timeline = Timeline()
        wake = functools.partial(node.instances.restore, snapshot, timeline=timeline)
        report.add(name, await _first_response(wake, node, spec, request), "s")
        for step, step_s in timeline.to_dict().items():
            report.add(f"{name} {step}", step_s, "s")


def _remote(
    node: Node, minio: Path, snapshot: LocalSnapshot, request: Request
) -> contextlib.AbstractContextManager[Remote]:
    manifest, images = snapshot.manifest, node.parts.images
    assert manifest.function is not None
    assert manifest.parent is not None
    return remote_store(
        minio,
        node.parts.settings.home,
        snapshot,
        {d: images.path(d) for d in (manifest.image, manifest.function.app)},
        base=node.parts.snapshots.get(manifest.parent),
        request=request,
    )


def _request_of(spec: FunctionSpec) -> Request:
    """The first request: the function's first warm-up, else GET /."""
    if not spec.warmup:
        return Request()
    first = spec.warmup[0]
    return Request(first.method, first.path, tuple(first.headers), first.body)


async def _first_response(
    make: Callable[[], Awaitable[Instance]], node: Node, spec: FunctionSpec, request: Request
) -> float:
    await in_thread(node.parts.slots.prepare_more, 1)
    begin = time.perf_counter()
    instance = await make()
    try:
        await in_thread(
            send_request,
            instance.address,
            spec.port,
            request,
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
