"""One node, as the command line (and later the daemon) uses it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.errors import Conflict, FunctionFailed, InvalidInput, NotFound, TorporError
from torpor.host.cancel import in_thread
from torpor.host.lock import exclusive, shared
from torpor.image.spec import load_spec
from torpor.node.capture import Captured, capture
from torpor.node.deploy import Deployed, Deployer
from torpor.node.exchange import Exchange
from torpor.node.instance import Instances, read_tail
from torpor.node.invoke import Request, Response, send_request
from torpor.node.parts import Parts, Reporter, log, open_parts
from torpor.node.reconcile import reconcile
from torpor.node.timeline import Timeline
from torpor.units import parse_name
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from torpor.config import Settings
    from torpor.image.library import ImageInfo
    from torpor.image.spec import FunctionSpec
    from torpor.node.instance import Instance
    from torpor.node.journal import InstanceRow
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.manifest import Function
    from torpor.snapshot.transfer import TransferReport
    from torpor.units import Digest
    from torpor.vmm.interface import Driver

_LOCK_WAIT_S = 10.0


@dataclass(frozen=True)
class Invoked:
    """A response, the instance that gave it, and whether it had to be woken for it."""

    response: Response
    instance_id: str
    woken: bool
    timeline: Timeline


@dataclass(frozen=True)
class NamedSnapshot:
    """A snapshot on this node and the names that point to it."""

    snapshot: LocalSnapshot
    names: tuple[str, ...]


class Node:
    """A home with all that can be done in it. Belongs to one asyncio loop."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.instances = Instances(parts)
        self.exchange = Exchange(parts)
        self._deployer = Deployer(parts, self.instances)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        settings: Settings,
        *,
        reporter: Reporter | None = None,
        driver: Driver | None = None,
    ) -> AsyncIterator[Node]:
        """Open a home and undo what dead commands left in it."""
        node = cls(await in_thread(open_parts, settings, reporter=reporter, driver=driver))
        await reconcile(node.parts, node.instances)
        yield node

    # images

    async def build_image(self, directory: Path, *, rebuild: bool = False) -> ImageInfo:
        """Build the image that DIR/function.toml names, or find it built."""
        spec = await in_thread(load_spec, directory)
        return await in_thread(
            self.parts.images.build, spec.image, progress=self.parts.reporter.say, rebuild=rebuild
        )

    async def remove_image(self, digest: str) -> ImageInfo:
        """Delete an image. Raises Conflict while a snapshot on this node needs it."""
        info = await in_thread(self.parts.images.get, digest)
        with self._files_lock(alone=True):
            users = [s.digest[:12] for s in self.parts.snapshots.list() if _needs(s, info.digest)]
            if users:
                raise Conflict(
                    f"image {info.digest[:12]} is in use",
                    reason=f"by snapshots {', '.join(users)}",
                    hint="remove those first, with `torpor rm` or `torpor snapshot rm`",
                )
            await in_thread(self.parts.images.remove, info.digest)
        return info

    # functions

    async def deploy(self, directory: Path, *, name: str | None = None) -> Deployed:
        """Deploy the function in a directory; its name then points to the new revision."""
        return await self.deploy_spec(await in_thread(load_spec, directory, name=name))

    async def deploy_spec(self, spec: FunctionSpec) -> Deployed:
        """Deploy a function. Raises Conflict while another deploy of it runs, see Deployer."""
        with self._function_lock(spec.name), self._files_lock():
            known = self.parts.journal.ref(spec.name)
            revision = 1
            if known is not None:
                old = await in_thread(self.parts.snapshots.get, known.digest)
                revision = _function_of(old, spec.name).revision + 1
            deployed = await self._deployer.deploy(spec, revision=revision)
            self.parts.journal.set_ref(spec.name, deployed.captured.snapshot.digest)
        await self.collect()
        return deployed

    async def start_cold(self, spec: FunctionSpec, timeline: Timeline) -> Instance:
        """Boot a function without any snapshot (for comparison); stop it with `stop_instance`."""
        return await self._deployer.start_cold(spec, timeline)

    def functions(self) -> list[NamedSnapshot]:
        """The names that point to a function's snapshot."""
        return [named for named in self.snapshots() if named.snapshot.manifest.kind == "function"]

    async def remove_function(self, name: str) -> list[str]:
        """Stop a function's instances and delete its name; the ids that were stopped."""
        with self._function_lock(name):
            if self.parts.journal.ref(name) is None:
                raise NotFound(f"there is no function {name!r}", hint="`torpor ls` lists them")
            stopped = []
            for row in self.parts.journal.instances():
                if row.function == name:
                    await self.stop(row.id)
                    stopped.append(row.id)
            self.parts.journal.drop_ref(name)
        await self.collect()
        return stopped

    async def invoke(self, name: str, request: Request, *, keep: bool = False) -> Invoked:
        """Send one request to a function, waking an instance if none runs.

        A woken instance is stopped again unless `keep`. `name` may be any ref or digest.
        """
        timeline = Timeline()
        row = self._running(name)
        if row is not None:
            with timeline.step("request"):
                response = await self._send(row.address, row.port, request, row.id)
            return Invoked(response, row.id, False, timeline)
        instance = await self._wake(name, timeline)
        try:
            assert instance.function is not None
            with timeline.step("request"):
                response = await self._send(
                    instance.address, instance.function.port, request, instance.id
                )
        except BaseException:
            await finish(self.instances.destroy(instance.id, vmm=instance.vmm))
            raise
        if keep:
            await self.instances.release(instance)
        else:
            await finish(self.instances.stop(instance))
        return Invoked(response, instance.id, True, timeline)

    # instances

    async def restore(self, reference: str) -> Instance:
        """Wake a snapshot by ref or digest, from this node or the store, and leave it running."""
        timeline = Timeline()
        instance = await self._wake(reference, timeline)
        await self.instances.release(instance)
        return instance

    async def stop(self, instance_id: str) -> str:
        """End an instance in order and remove all of it; its whole id."""
        row = self.parts.journal.instance(instance_id)
        if row.state == "running":
            try:
                instance = await self.instances.adopt(row)
            except TorporError as error:  # it cannot be told to end any more
                log.warning("instance does not answer id=%s error=%s", row.id, error)
            else:
                await finish(self.instances.stop(instance))
        await finish(self.instances.destroy(row.id))
        return row.id

    async def stop_instance(self, instance: Instance) -> None:
        """End an instance that this object made."""
        await finish(self.instances.stop(instance))

    def console(self, instance_id: str, *, lines: int = 10_000) -> str:
        """What an instance's console printed."""
        row = self.parts.journal.instance(instance_id)
        return read_tail(self.parts.instances_dir / row.id / "console.log", lines)

    # snapshots

    async def create_snapshot(self, instance_id: str, *, name: str | None = None) -> Captured:
        """Snapshot a running instance, which runs on; the snapshot gets a name."""
        if name is not None:
            parse_name(name, what="snapshot name")
        row = self.parts.journal.instance(instance_id)
        name = name or row.id
        with (
            self._files_lock(),
            exclusive(
                self.parts.locks_dir / f"instance-{row.id}", timeout_s=0, what=f"instance {row.id}"
            ),
        ):
            known = self.parts.journal.ref(name)
            if known is not None and self._kind(known.digest) == "function":
                raise Conflict(
                    f"{name!r} is the name of a function", hint="give another with --name"
                )
            instance = await self.instances.adopt(row)
            try:
                captured = await capture(
                    self.parts,
                    instance,
                    kind="instance",
                    function=instance.function,
                    then="resume",
                )
            finally:
                await instance.vmm.detach()
            self.parts.journal.set_ref(name, captured.snapshot.digest)
        return captured

    def snapshots(self) -> list[NamedSnapshot]:
        """All snapshots on this node, those without a name too."""
        names: dict[Digest, list[str]] = {}
        for ref in self.parts.journal.refs():
            names.setdefault(ref.digest, []).append(ref.name)
        return [
            NamedSnapshot(snapshot, tuple(names.get(snapshot.digest, ())))
            for snapshot in self.parts.snapshots.list()
        ]

    async def inspect(self, reference: str) -> NamedSnapshot:
        """A snapshot on this node by ref, digest or a digest's beginning."""
        snapshot = await in_thread(self._find_local, reference)
        if snapshot is None:
            raise NotFound(
                f"there is no snapshot {reference!r} on this node",
                hint="`torpor snapshot ls` lists them, `torpor snapshot pull` fetches one",
            )
        names = [ref.name for ref in self.parts.journal.refs() if ref.digest == snapshot.digest]
        return NamedSnapshot(snapshot, tuple(names))

    async def verify(self, reference: str) -> NamedSnapshot:
        """Read every byte of a snapshot on this node. Raises Damaged naming the file."""
        named = await self.inspect(reference)
        await in_thread(self.parts.snapshots.verify, named.snapshot.digest)
        return named

    async def remove_snapshot(self, reference: str) -> NamedSnapshot:
        """Delete a named snapshot. Raises Conflict for a function's: `rm` is for those."""
        named = await self.inspect(reference)
        if named.snapshot.manifest.kind == "function" and named.names:
            raise Conflict(
                f"{reference!r} is the snapshot of function {named.names[0]!r}",
                hint=f"`torpor rm {named.names[0]}` deletes the function",
            )
        users = [
            row.id
            for row in self.parts.journal.instances()
            if row.snapshot == named.snapshot.digest
        ]
        if users:
            raise Conflict(
                f"snapshot {named.snapshot.digest[:12]} is in use",
                reason=f"by instances {', '.join(users)}",
                hint="stop those first",
            )
        with self._files_lock(alone=True):
            for name in named.names:
                self.parts.journal.drop_ref(name)
            self.parts.journal.drop_base(named.snapshot.digest)
            await in_thread(self.parts.snapshots.remove, named.snapshot.digest)
        return named

    async def push(self, reference: str) -> TransferReport:
        """Send a snapshot to the store under its name. Raises StoreError, Conflict."""
        named = await self.inspect(reference)
        if not named.names:
            raise InvalidInput(
                f"snapshot {named.snapshot.digest[:12]} has no name to push it under",
                hint="`torpor snapshot create` gives one",
            )
        name = reference if reference in named.names else named.names[0]
        with self._files_lock():
            return await in_thread(self.exchange.push, named.snapshot, name)

    async def pull(
        self, reference: str, *, expect: Digest | None = None
    ) -> tuple[NamedSnapshot, TransferReport]:
        """Fetch a snapshot from the store; a ref becomes a name on this node.

        With `expect`, a ref that points to another snapshot is refused with Conflict.
        """
        with self._files_lock():
            digest, report = await in_thread(self._pull, reference, expect)
        return await self.inspect(digest), report

    async def collect(self) -> list[Digest]:
        """Delete snapshots that no name, base or instance needs; skipped while others work."""
        try:
            with self._files_lock(alone=True, wait_s=0):
                return await in_thread(self._collect)
        except Conflict:
            return []

    # inside

    def _collect(self) -> list[Digest]:
        journal = self.parts.journal
        needed = {ref.digest for ref in journal.refs()} | set(journal.bases().values())
        needed |= {row.snapshot for row in journal.instances()}  # type: ignore[misc]
        unneeded = [s.digest for s in self.parts.snapshots.list() if s.digest not in needed]
        for digest in unneeded:
            self.parts.snapshots.remove(digest)
        return unneeded

    async def _wake(self, reference: str, timeline: Timeline) -> Instance:
        with self._files_lock():
            snapshot = await in_thread(self._find_local, reference)
            if snapshot is None:
                with timeline.step("pull"):
                    digest, _ = await in_thread(self._pull, reference)
                snapshot = await in_thread(self.parts.snapshots.get, digest)
            if snapshot.manifest.function is None:
                raise InvalidInput(
                    f"{reference!r} is a base and has no function in it",
                    hint="restore a function or the snapshot of an instance",
                )
            return await self.instances.restore(snapshot, timeline=timeline)

    def _find_local(self, reference: str) -> LocalSnapshot | None:
        ref = self.parts.journal.ref(reference)
        if ref is not None:
            return self.parts.snapshots.get(ref.digest)
        try:
            return self.parts.snapshots.resolve(reference)
        except (NotFound, InvalidInput):
            return None

    def _running(self, name: str) -> InstanceRow | None:
        return next(
            (
                row
                for row in self.parts.journal.instances()
                if row.state == "running" and row.function == name
            ),
            None,
        )

    def _kind(self, digest: Digest) -> str:
        try:
            return self.parts.snapshots.get(digest).manifest.kind
        except NotFound:
            return ""

    async def _send(self, address: str, port: int, request: Request, instance_id: str) -> Response:
        timeout_s = self.parts.settings.request_timeout_s
        try:
            return await in_thread(send_request, address, port, request, timeout_s=timeout_s)
        except FunctionFailed as error:
            tail = read_tail(self.parts.instances_dir / instance_id / "console.log", 12)
            raise FunctionFailed(
                error.message, reason=f"{error.reason}\n{tail}".strip(), hint=error.hint
            ) from None

    def _pull(self, reference: str, expect: Digest | None = None) -> tuple[Digest, TransferReport]:
        digest, manifest, report = self.exchange.pull(reference, expect=expect)
        if reference != digest and manifest.kind != "base":
            self.parts.journal.set_ref(reference, digest)
        return digest, report

    @contextlib.contextmanager
    def _function_lock(self, name: str) -> Iterator[None]:
        parse_name(name, what="function name")
        with exclusive(
            self.parts.locks_dir / f"function-{name}", timeout_s=0, what=f"function {name}"
        ):
            yield

    @contextlib.contextmanager
    def _files_lock(self, *, alone: bool = False, wait_s: float = _LOCK_WAIT_S) -> Iterator[None]:
        """Held shared by all that uses snapshots and images, alone by what deletes them."""
        take = exclusive if alone else shared
        with take(self.parts.locks_dir / "files", timeout_s=wait_s, what="this home's snapshots"):
            yield


def _function_of(snapshot: LocalSnapshot, name: str) -> Function:
    function = snapshot.manifest.function
    if function is None or snapshot.manifest.kind != "function":
        raise Conflict(
            f"{name!r} is the name of a snapshot, not of a function",
            hint="deploy under another name, or remove it with `torpor snapshot rm`",
        )
    return function


def _needs(snapshot: LocalSnapshot, image: Digest) -> bool:
    manifest = snapshot.manifest
    return image in (manifest.image, manifest.function.app if manifest.function else None)
