"""Wakes on a node that has nothing: a real MinIO behind a shaped link whose GETs come late."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torpor.bench.far import FarStore, far_store
from torpor.bench.link import inside
from torpor.bench.transfer import WAYS, Job, Pull, perform
from torpor.host.cancel import in_thread
from torpor.node.invoke import Request, send_request
from torpor.node.node import Node
from torpor.snapshot.repository.keys import parse_keyring
from torpor.snapshot.repository.repository import Repository
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torpor.bench.report import Report
    from torpor.bench.transfer import Way
    from torpor.config import Settings
    from torpor.snapshot.local import LocalSnapshot
    from torpor.units import Digest

_REF: Final = "remote"


@dataclass(frozen=True)
class Remote(FarStore):
    """A far store with one snapshot in it, pushed both ways."""

    request: Request
    port: int

    def stored_bytes(self, base: Settings) -> int:
        """Sealed bytes of the snapshot's non-zero memory, as the repository holds it. Blocking."""

        def read() -> int:
            settings = self.settings(base, base.home)
            repository = Repository(
                open_store(settings), parse_keyring(self.target.key, source="the benchmark")
            )
            return repository.read_resolved(repository.resolve(_REF)).memory.stored_bytes

        return inside(self.link.node_side, read)


@contextlib.contextmanager
def remote_store(
    program: Path,
    home: Path,
    snapshot: LocalSnapshot,
    images: Mapping[Digest, Path],
    *,
    base: LocalSnapshot | None,
    request: Request,
) -> Iterator[Remote]:
    """A store with a snapshot pushed to it, all of it gone after the body. Blocking."""
    assert snapshot.manifest.function is not None
    with far_store(program, home) as store:
        for way in WAYS:
            store.push(snapshot, images, base=base, ref=_REF, way=way)
        port = snapshot.manifest.function.port
        yield Remote(store.directory, store.link, store.near, store.target, request, port)


async def add_remote_round(report: Report, remote: Remote, base: Settings) -> None:
    """One sample of each way to wake on a node that has nothing."""
    await _lazy(report, remote, base, "remote_cold", push=True)
    await _lazy(report, remote, base, "no_working_set", push=False)
    await _whole(report, remote, base, "whole_file", "zeros")
    await _whole(report, remote, base, "whole_sparse", "whole")


async def _lazy(report: Report, remote: Remote, base: Settings, name: str, *, push: bool) -> None:
    home = remote.directory / name
    settings = remote.settings(base, home)
    try:
        async with Node.open(settings) as node:
            node.paging.pushes = push
            await in_thread(inside, remote.link.node_side, node.paging.prepare)
            await in_thread(node.parts.slots.prepare_more, 1)
            began = time.perf_counter()
            instance = await node.restore(_REF)
            restored_s = time.perf_counter() - began
            try:
                await _first(node, remote, instance.address)
                report.add(name, time.perf_counter() - began, "s")
                counters = await in_thread(node.paging.client.counters)
            finally:
                await node.instances.destroy(instance.id, vmm=instance.vmm)
            for step, step_s in instance.timeline.to_dict().items():
                report.add(f"{name} {step}", step_s, "s")
            report.add(f"{name} restored", restored_s, "s")
            _count(report, name, counters)
            await in_thread(node.paging.client.stop)
    finally:
        await in_thread(shutil.rmtree, home, ignore_errors=True)


def _count(report: Report, name: str, counters: dict[str, Any]) -> None:
    (opened,) = counters["snapshots"].values()
    pushed = opened["push"]["fetched_bytes"] if opened["push"] else 0
    report.add(f"{name} fetched", pushed + counters["fetched"]["bytes"], "bytes")
    report.add(f"{name} GETs for demand", counters["fetched"]["requests"], "requests")
    memory = opened["files"]["memory"]
    report.add(f"{name} windows from the store", memory["store"], "windows")
    report.add(f"{name} stalled", sum(memory["stalled_s"].values()), "s")
    report.add("pager peak", counters["peak_bytes"], "bytes")


async def _whole(report: Report, remote: Remote, base: Settings, name: str, way: Way) -> None:
    """Whole files: everything comes first, then the guest runs from the node's own files."""
    home = remote.directory / "whole"
    try:
        job = Job(remote.target, Pull(str(home), _REF), way)
        outcome = await in_thread(perform, job, namespace=remote.link.node_side)
        settings = dataclasses.replace(remote.settings(base, home), transfer="whole", lazy=False)
        async with Node.open(settings, collect=False) as node:
            (named,) = node.snapshots()
            await in_thread(node.parts.slots.prepare_more, 1)
            began = time.perf_counter()
            instance = await node.instances.restore(named.snapshot)
            try:
                await _first(node, remote, instance.address)
                report.add(name, outcome.duration_s + time.perf_counter() - began, "s")
            finally:
                await node.instances.destroy(instance.id, vmm=instance.vmm)
    finally:
        await in_thread(shutil.rmtree, home, ignore_errors=True)


async def _first(node: Node, remote: Remote, address: str) -> None:
    timeout_s = node.parts.settings.request_timeout_s
    await in_thread(send_request, address, remote.port, remote.request, timeout_s=timeout_s)
