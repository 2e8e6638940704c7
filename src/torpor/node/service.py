"""What commands ask of a node, whether they have it themselves or a daemon has it.

`LocalService` is a Node that was opened; the API's client is the other one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from torpor.host.cancel import in_thread
from torpor.node.console import follow
from torpor.node.reconcile import reconcile
from torpor.node.stalls import find_stalled
from torpor.node.views import (
    CapturedView,
    DeployedView,
    ForkedView,
    FunctionView,
    InstanceView,
    InvokedView,
    LogsView,
    RemovedView,
    RestoredView,
    RevisionView,
    SnapshotView,
    UnreadableView,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from torpor.node.capture import Captured
    from torpor.node.catalogue import NamedSnapshot
    from torpor.node.deploy import Deployed
    from torpor.node.invoke import Request
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.live import Instance
    from torpor.node.node import Invoked, Node
    from torpor.node.tables import RemoteRow
    from torpor.node.timeline import Timeline
    from torpor.units import Digest

    Woke = Callable[[str, str, Timeline], None]


class Service(Protocol):
    """A node, near or far. All errors are TorporErrors; each method says as `Node` what it does."""

    async def functions(self) -> list[FunctionView]:
        """The functions of the node."""

    async def instances(self) -> list[InstanceView]:
        """The instances of the node; what is dead was removed first."""

    async def snapshots(self) -> list[SnapshotView]:
        """The snapshots of the node, bases too."""

    async def unreadable(self) -> list[UnreadableView]:
        """The snapshots of the node that cannot be read, and why."""

    async def deploy(self, directory: Path, *, name: str | None = None) -> DeployedView:
        """Deploy the function of a directory of the node's host."""

    async def invoke(
        self, name: str, request: Request, *, keep: bool = False, trace: bool = False
    ) -> InvokedView:
        """Send one request to a function, waking it if it sleeps."""

    async def remove_function(self, name: str) -> RemovedView:
        """Delete a function; its instances are stopped."""

    async def restore(
        self, reference: str, *, expect: Digest | None = None, trace: bool = False
    ) -> RestoredView:
        """Wake a snapshot and leave the instance running."""

    async def fork(self, instance_id: str, *, count: int = 1) -> ForkedView:
        """Make clones of a running instance."""

    async def stop(self, instance_ids: Sequence[str]) -> list[str]:
        """End instances; their whole ids."""

    async def logs(self, instance_id: str, *, lines: int = 1000) -> LogsView:
        """What an instance's console printed."""

    def follow_logs(self, instance_id: str, *, lines: int = 1000) -> AsyncIterator[str]:
        """Its last lines and each one that it prints, until the instance ends."""

    async def create_snapshot(
        self, instance_id: str, *, name: str | None = None, trial: bool = False
    ) -> CapturedView:
        """Snapshot a running instance, which runs on."""

    async def remove_snapshot(self, reference: str) -> str:
        """Delete a snapshot; its digest."""


class LocalService:
    """The Service of a Node in this process."""

    def __init__(self, node: Node, woke: Woke | None = None) -> None:
        """`woke` is told of each instance that is woken: its function, its id, its timeline."""
        self._node = node
        self._woke = woke or (lambda function, instance, timeline: None)

    async def functions(self) -> list[FunctionView]:
        """See Service."""
        return await in_thread(self._functions)

    async def revisions(self, name: str) -> list[RevisionView]:
        """The revisions of a function that are on the node, latest first. Raises NotFound."""
        current = (await self._node.inspect(name)).snapshot.digest
        found = [
            RevisionView(
                function=name,
                revision=manifest.function.revision,
                refreshed=manifest.function.refreshed,
                snapshot=named.snapshot.digest,
                created_ns=manifest.created_ns,
                current=named.snapshot.digest == current,
            )
            for named in await in_thread(self._node.snapshots)
            if (manifest := named.snapshot.manifest).kind == "function"
            and manifest.function is not None
            and (manifest.function.name == name or named.snapshot.digest == current)
        ]
        return sorted(found, key=lambda view: -view.created_ns)

    async def instances(self) -> list[InstanceView]:
        """See Service."""
        await reconcile(self._node.parts, self._node.instances, self._node.paging)
        stalled = await find_stalled(self._node.parts, self._node.instances)
        rows = await in_thread(self._node.parts.journal.instances)
        views = [view_instance(row) for row in rows]
        return [
            msgspec.structs.replace(view, state="stalled") if view.id in stalled else view
            for view in views
        ]

    async def snapshots(self) -> list[SnapshotView]:
        """See Service."""
        return await in_thread(lambda: [view_snapshot(n) for n in self._node.snapshots()])

    async def unreadable(self) -> list[UnreadableView]:
        """See Service."""
        return [
            UnreadableView(
                snapshot=one.digest,
                kind="unreadable",
                names=names,
                reason=str(one.error),
                disk_usage_bytes=one.disk_usage_bytes,
            )
            for one, names in await in_thread(self._node.catalogue.unreadable)
        ]

    async def deploy(self, directory: Path, *, name: str | None = None) -> DeployedView:
        """See Service."""
        return _view_deployed(await self._node.deploy(directory, name=name))

    async def invoke(
        self, name: str, request: Request, *, keep: bool = False, trace: bool = False
    ) -> InvokedView:
        """See Service."""
        invoked = await self._node.invoke(name, request, keep=keep, trace=trace)
        if invoked.woken:
            self._woke(name, invoked.instance_id, invoked.timeline)
        return _view_invoked(invoked)

    async def remove_function(self, name: str) -> RemovedView:
        """See Service."""
        return RemovedView(function=name, stopped=tuple(await self._node.remove_function(name)))

    async def restore(
        self, reference: str, *, expect: Digest | None = None, trace: bool = False
    ) -> RestoredView:
        """See Service."""
        return self._view_woken(await self._node.restore(reference, expect=expect, trace=trace))

    async def fork(self, instance_id: str, *, count: int = 1) -> ForkedView:
        """See Service."""
        whole = self._node.parts.journal.instance(instance_id).id
        forked = await self._node.fork(whole, count=count)
        return ForkedView(
            instance=whole,
            snapshot=forked.captured.snapshot.digest,
            pause_s=forked.captured.pause_s,
            clones=tuple(self._view_woken(clone) for clone in forked.clones),
        )

    async def stop(self, instance_ids: Sequence[str]) -> list[str]:
        """See Service."""
        return await self._node.stop_all(instance_ids)

    async def logs(self, instance_id: str, *, lines: int = 1000) -> LogsView:
        """See Service."""
        text = await in_thread(self._node.console, instance_id, lines=lines)
        return LogsView(instance=instance_id, lines=tuple(text.splitlines()))

    async def follow_logs(self, instance_id: str, *, lines: int = 1000) -> AsyncIterator[str]:
        """See Service. Raises NotFound at the first line."""
        parts = self._node.parts
        row = await in_thread(parts.journal.instance, instance_id)

        def lives() -> bool:
            return any(other.id == row.id for other in parts.journal.instances())

        path = parts.instances_dir / row.id / "console.log"
        async for line in follow(path, lines, lives=lives):
            yield line

    async def create_snapshot(
        self, instance_id: str, *, name: str | None = None, trial: bool = False
    ) -> CapturedView:
        """See Service."""
        return _view_captured(await self._node.create_snapshot(instance_id, name=name, trial=trial))

    async def remove_snapshot(self, reference: str) -> str:
        """See Service."""
        return await self._node.remove_snapshot(reference)

    def _view_woken(self, instance: Instance) -> RestoredView:
        assert instance.function is not None
        self._woke(instance.function.name, instance.id, instance.timeline)
        return view_restored(instance)

    def _functions(self) -> list[FunctionView]:
        running = [row.function for row in self._node.parts.journal.instances()]
        remotes = {row.name: row for row in self._node.remote.rows.rows()}
        told = self._node.remote.active
        return [
            _view_function(named, name, running, _in_store(remotes.get(name)) if told else "")
            for named in self._node.functions()
            for name in named.names
        ]


def view_instance(row: InstanceRow) -> InstanceView:
    """A row of the journal."""
    return InstanceView(
        id=row.id,
        function=row.function,
        state=row.state,
        address=row.address,
        port=row.port,
        slot=row.slot,
        snapshot=row.snapshot,
        pid=row.vmm.pid if row.vmm else None,
        created_ns=row.created_ns,
    )


def view_snapshot(named: NamedSnapshot) -> SnapshotView:
    """A snapshot with its names."""
    manifest = named.snapshot.manifest
    return SnapshotView(
        snapshot=named.snapshot.digest,
        kind=manifest.kind,
        names=named.names,
        function=manifest.function.name if manifest.function else None,
        parent=manifest.parent,
        image=manifest.image,
        memory_bytes=manifest.memory.size_bytes,
        nonzero_bytes=manifest.memory.data_bytes,
        vmstate_bytes=manifest.vmstate.size_bytes,
        disk_data_bytes=manifest.disk.data_bytes,
        disk_usage_bytes=named.snapshot.disk_usage_bytes(),
    )


def view_restored(instance: Instance) -> RestoredView:
    """An instance of a function that was just woken."""
    assert instance.function is not None
    return RestoredView(
        instance=instance.id,
        address=f"{instance.address}:{instance.function.port}",
        steps_s=instance.timeline.to_dict(),
        trace=None if instance.trace is None else instance.trace.to_dict(),
    )


def _in_store(row: RemoteRow | None) -> str:
    if row is None:
        return "pending"
    return f"{row.state}: {row.error}" if row.error else row.state


def _view_function(
    named: NamedSnapshot, name: str, running: Sequence[str], store: str
) -> FunctionView:
    manifest = named.snapshot.manifest
    assert manifest.function is not None
    return FunctionView(
        name=name,
        revision=manifest.function.revision,
        snapshot=named.snapshot.digest,
        port=manifest.function.port,
        memory_bytes=manifest.machine.memory_bytes,
        disk_usage_bytes=named.snapshot.disk_usage_bytes(),
        instances=running.count(name),
        store=store,
    )


def _view_deployed(deployed: Deployed) -> DeployedView:
    captured, manifest = deployed.captured, deployed.captured.snapshot.manifest
    return DeployedView(
        function=deployed.name,
        revision=deployed.revision,
        snapshot=captured.snapshot.digest,
        base_reused=deployed.base_reused,
        pause_s=captured.pause_s,
        written_bytes=captured.written_bytes,
        memory_bytes=manifest.machine.memory_bytes,
        nonzero_bytes=manifest.memory.data_bytes,
        image_bytes=deployed.image_bytes,
        steps_s=deployed.timeline.to_dict(),
    )


def _view_invoked(invoked: Invoked) -> InvokedView:
    response = invoked.response
    return InvokedView(
        status=response.status,
        reason=response.reason,
        headers=response.headers,
        body=response.body,
        instance=invoked.instance_id,
        woken=invoked.woken,
        steps_s=invoked.timeline.to_dict(),
        trace=None if invoked.trace is None else invoked.trace.to_dict(),
    )


def _view_captured(captured: Captured) -> CapturedView:
    return CapturedView(
        snapshot=captured.snapshot.digest,
        pause_s=captured.pause_s,
        written_bytes=captured.written_bytes,
        steps_s=captured.timeline.to_dict(),
        working_set={part.file: len(part.windows) for part in captured.snapshot.working_set()},
    )
