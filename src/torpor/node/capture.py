"""A snapshot of a running instance: memory, device state and scratch disk of one instant.

Inside the pause: device state, the pages written since the instance's memory was mapped, and what
was written to the scratch disk since it was copied, just before. Everything else happens before -
opening, finding, making room - or after it: laying those pages over the parent's memory, hashing,
the manifest.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torpor.errors import GuestFailed, NoSpace, VmmFailed
from torpor.host.barrier import reach
from torpor.host.cancel import in_thread
from torpor.host.frozen import DiskCopy
from torpor.host.space import is_full
from torpor.host.sparse import copy_extents, copy_sparse, write_page_runs
from torpor.node.timeline import Timeline
from torpor.vmm.interface import VmmState, finish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.node.live import Instance
    from torpor.node.parts import Parts
    from torpor.snapshot.local import LocalSnapshot, Staging
    from torpor.snapshot.manifest import Function, Kind
    from torpor.units import Digest
    from torpor.vmm.interface import WrittenMemory

_SYNC_TIMEOUT_S = 60.0
_LITTLE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Captured:
    """A new snapshot on this node; the pause and the memory that was written since the parent."""

    snapshot: LocalSnapshot
    pause_s: float
    written_bytes: int
    timeline: Timeline


async def capture(
    parts: Parts,
    instance: Instance,
    *,
    kind: Kind,
    function: Function | None,
    then: Literal["resume", "stop"],
) -> Captured:
    """Snapshot a RUNNING instance, which then runs on or is stopped.

    When it fails or is cancelled the instance runs on if its VMM still lives, and nothing of the
    snapshot is left. Raises NoSpace, VmmFailed, GuestFailed; OSError when a pager does not get what
    is missing of the parent (see `Paging.copied`).
    """
    timeline = Timeline()
    parent = instance.parent
    driver = parts.driver if parent is None else parts.driver_of(parent.manifest)
    with timeline.step("sync"), _telling_full(instance.directory):
        await instance.with_agent(lambda agent: agent.sync(), timeout_s=_SYNC_TIMEOUT_S)
    with parts.snapshots.stage() as staging:
        vmm, data = instance.vmm, staging.directory / "written"
        with timeline.step("ahead"):
            disk = await in_thread(DiskCopy, vmm.config.scratch, staging.disk)
        async with vmm.ready_to_freeze(staging.vmstate, data):
            created_ns = time.time_ns()
            began = time.perf_counter()
            try:
                with _telling_full(staging.directory):
                    written = await vmm.freeze(staging.vmstate, data, step=timeline.step)
                reach("instance paused")
                if not disk.is_done():
                    with timeline.step("disk"):
                        await in_thread(disk.finish)
            except BaseException:
                await finish(_resume_if_paused(instance))
                raise
            if then == "resume":
                with timeline.step("resume"):
                    await vmm.resume()
                reach("instance resumed")
            pause_s = time.perf_counter() - began
        if then == "stop":
            await vmm.stop()
        with timeline.step("assemble"):
            await in_thread(_assemble, staging, instance.parent, written, instance)
        with timeline.step("publish"):
            digest = await in_thread(
                staging.publish,
                kind=kind,
                created_ns=created_ns,
                parent=_parent_digest(instance),
                platform=driver.platform(parts.boot_files().kernel_digest),
                machine=instance.machine,
                image=instance.image,
                function=function,
            )
    reach("snapshot published")
    snapshot = await in_thread(parts.snapshots.get, digest)
    return Captured(snapshot, pause_s, written.size_bytes, timeline)


@contextlib.contextmanager
def _telling_full(directory: Path) -> Iterator[None]:
    """A VMM or guest that cannot write says only that; whether the disk is full is seen here."""
    try:
        yield
    except (VmmFailed, GuestFailed) as error:
        if not is_full(directory, below_bytes=_LITTLE_BYTES):
            raise
        raise NoSpace(
            "the disk is full, the instance could not be captured", reason=str(error)
        ) from None


async def _resume_if_paused(instance: Instance) -> None:
    if instance.vmm.state is VmmState.PAUSED:
        await instance.vmm.resume()


def _assemble(
    staging: Staging, parent: LocalSnapshot | None, written: WrittenMemory, instance: Instance
) -> None:
    """The whole memory: the parent's, or zeros, with the written pages laid over it."""
    if parent is not None:
        _copy_memory(parent, staging.memory)
    else:
        with staging.memory.open("wb") as stream:
            stream.truncate(instance.machine.memory_bytes)
    with staging.memory.open("r+b", buffering=0) as target, written.data.open("rb") as source:
        write_page_runs(target.fileno(), written.pieces, source.fileno())
    written.data.unlink()
    if parent is not None:
        staging.record_written(written.runs)
        staging.record_working_set(parent.working_set())


def _copy_memory(parent: LocalSnapshot, target: Path) -> None:
    """The parent's memory; one that a pager serves is fetched here, where it is not zeros."""
    if parent.served is None:
        copy_sparse(parent.memory, target)
    else:
        memory = parent.manifest.memory
        copy_extents(parent.memory, target, size_bytes=memory.size_bytes, extents=memory.extents)


def _parent_digest(instance: Instance) -> Digest | None:
    return None if instance.parent is None else instance.parent.digest
