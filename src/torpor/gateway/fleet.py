"""What the gateway asks of a node: few questions, so that it can be tested without VMs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torpor.errors import Conflict, DataError, InvalidInput, NotFound, TorporError
from torpor.host.cancel import in_thread
from torpor.host.lock import is_in_use
from torpor.node.parts import log
from torpor.node.refresh import refresh_function
from torpor.snapshot.manifest import Scale
from torpor.units import Digest

if TYPE_CHECKING:
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.node import Node
    from torpor.node.timeline import Timeline
    from torpor.snapshot.manifest import Manifest


@dataclass(frozen=True)
class Ready:
    """An instance that takes requests: where, and of which snapshot."""

    id: str
    function: str
    snapshot: str
    address: str
    port: int


@dataclass(frozen=True)
class Deployed:
    """A function: how it scales, and its snapshot, empty while only the store knows it.

    `refreshed` counts how often that was replaced since the deploy. `here`: a wake needs nothing
    of the store.
    """

    scale: Scale = field(default_factory=Scale)
    snapshot: str = ""
    refreshed: int = 0
    here: bool = False


@dataclass(frozen=True)
class View:
    """What is on the node at one moment: functions by name, instances that run."""

    functions: dict[str, Deployed]
    instances: list[Ready]


@dataclass(frozen=True)
class Woken:
    """A wake's instance, where its snapshot was (`local`, or only in the `store`), its steps."""

    ready: Ready
    how: str
    timeline: Timeline | None = None


class Fleet(Protocol):
    """The functions and instances of one node. All errors are TorporErrors."""

    async def view(self) -> View:
        """What is on the node now."""

    def changed(self) -> bool:
        """Whether the next view may differ from the last; cheap, does not block."""

    async def find_elsewhere(self, name: str) -> bool:
        """Whether a function that is not on this node could be fetched from the store."""

    async def wake(self, name: str) -> Woken:
        """One more instance of a function; it is ready when this returns. Raises NotFound, …"""

    async def stop(self, instance_id: str) -> None:
        """End an instance in order; one that is gone already is none of the errors."""

    async def refresh(self, instance_id: str) -> None:
        """Let a snapshot of a running instance take the place of its function's."""


class NodeFleet:
    """The Fleet of a Node. Instances of a function are all that were woken from a snapshot of it.

    Whoever woke them: they end with the function's idle time, but for those that belong to a
    command (`restore --wait`), which also get no requests.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._manifests: dict[str, Manifest] = {}
        self._lacking: set[str] = set()
        self._seen = (0, 0.0)

    async def view(self) -> View:
        """See Fleet."""
        self._seen = (self._node.parts.journal.change_count(), time.monotonic())
        return await in_thread(self._view)

    def changed(self) -> bool:
        """See Fleet: the journal was written, or two seconds passed, for a VM may have died."""
        count, looked = self._seen
        return count != self._node.parts.journal.change_count() or time.monotonic() - looked > 2.0

    async def find_elsewhere(self, name: str) -> bool:
        """See Fleet."""
        return await in_thread(self._is_in_store, name)

    async def wake(self, name: str) -> Woken:
        """See Fleet."""
        instance = await self._node.restore(name)
        assert instance.function is not None
        assert instance.parent is not None
        steps = {step.name for step in instance.timeline.steps}
        ready = Ready(
            instance.id,
            instance.function.name,
            instance.parent.digest,
            instance.address,
            instance.function.port,
        )
        how = "store" if steps & {"pull", "open"} else "local"
        return Woken(ready, how, instance.timeline)

    async def stop(self, instance_id: str) -> None:
        """See Fleet. Raises Conflict while a command or the API has a request at it."""
        if is_in_use(self._node.parts.instances_dir / instance_id):
            raise Conflict(f"instance {instance_id} is asked by others than this gateway")
        await self._node.instances.end(instance_id)

    async def refresh(self, instance_id: str) -> None:
        """See Fleet."""
        await refresh_function(
            self._node.parts, self._node.instances, self._node.paging, instance_id
        )

    def _view(self) -> View:
        journal = self._node.parts.journal
        refs, rows = journal.refs(), journal.instances()
        needed = {ref.digest for ref in refs} | {row.snapshot for row in rows if row.snapshot}
        self._manifests = {
            digest: manifest for digest in needed if (manifest := self._manifest(digest))
        }
        functions = {}
        for ref in refs:
            manifest = self._manifests.get(ref.digest)
            if manifest is not None and manifest.kind == "function" and manifest.function:
                scale = manifest.function.scale or Scale()
                functions[ref.name] = Deployed(
                    scale,
                    ref.digest,
                    manifest.function.refreshed,
                    here=ref.digest not in self._lacking,
                )
        return View(functions, [ready for row in rows if (ready := self._ready(row))])

    def _ready(self, row: InstanceRow) -> Ready | None:
        manifest = self._manifests.get(row.snapshot)
        if row.state != "running" or row.keeper is not None or manifest is None:
            return None
        if manifest.kind != "function" or row.vmm is None or not row.vmm.is_alive():
            return None
        return Ready(row.id, row.function, row.snapshot, row.address, row.port)

    def _manifest(self, digest: str) -> Manifest | None:
        known = self._manifests.get(digest)
        if known is not None:
            return known
        try:
            found = self._node.parts.snapshots.get(Digest(digest))
            (self._lacking.discard if found.served is None else self._lacking.add)(digest)
            return found.manifest
        except (NotFound, DataError) as error:
            log.debug("snapshot is passed over digest=%s error=%s", digest, error)
            return None

    def _is_in_store(self, name: str) -> bool:
        settings = self._node.parts.settings
        if settings.transfer != "repository":
            return False
        try:
            return self._node.exchange.repository().read_ref(name) is not None
        except InvalidInput:  # no key: then this node takes nothing from the store
            return False
        except TorporError as error:
            log.warning("the store was not asked name=%s error=%s", name, error)
            raise
