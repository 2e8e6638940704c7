"""One node, as the command line (and later the daemon) uses it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.errors import (
    Conflict,
    InvalidInput,
    NotFound,
)
from torpor.host.barrier import reach
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.host.lock import exclusive
from torpor.image.spec import load_spec
from torpor.node.arrival import Arrivals
from torpor.node.asking import Asking
from torpor.node.capture import Captured, capture
from torpor.node.catalogue import Catalogue
from torpor.node.collect import collect
from torpor.node.console import read_tail
from torpor.node.deploy import Deployed, Deployer, next_revision, recipe_of
from torpor.node.exchange import Exchange
from torpor.node.fork import Forked, fork
from torpor.node.instance import Instances
from torpor.node.invoke import Request, Response
from torpor.node.paging import Paging
from torpor.node.parts import Parts, Reporter, open_parts
from torpor.node.reconcile import reconcile
from torpor.node.remote import Remote
from torpor.node.stalls import revive
from torpor.node.tables import Recipes
from torpor.node.timeline import Timeline
from torpor.node.trace import Trace, Tracer
from torpor.node.trials import Trials
from torpor.units import Digest, parse_name
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from torpor.config import Settings
    from torpor.image.library import ImageInfo
    from torpor.image.spec import FunctionSpec
    from torpor.node.catalogue import NamedSnapshot
    from torpor.node.collect import Unneeded
    from torpor.node.exchange import Exported, Imported
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.live import Instance
    from torpor.snapshot.transfer import TransferReport
    from torpor.vmm.interface import Driver


@dataclass(frozen=True)
class Invoked:
    """A response, the instance that gave it, and whether it had to be woken for it.

    `trace` is there when it was asked for and an instance was woken.
    """

    response: Response
    instance_id: str
    woken: bool
    timeline: Timeline
    trace: Trace | None = None


class Node:
    """A home with all that can be done in it. Belongs to one asyncio loop."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.paging = Paging(parts)
        self.instances = Instances(parts, self.paging)
        self.catalogue = Catalogue(parts)
        self.exchange = Exchange(parts, self.catalogue, self.paging)
        self.remote = Remote(parts, self.exchange)
        self._arrivals = Arrivals(parts, self.catalogue, self.exchange, self.paging, self.remote)
        self._trials = Trials(self.instances, self.paging)
        self._asking = Asking(parts, self.instances, self.catalogue, self.paging)
        self._deployer = Deployer(parts, self.instances, self._trials)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        settings: Settings,
        *,
        reporter: Reporter | None = None,
        driver: Driver | None = None,
        collect: bool = True,
    ) -> AsyncIterator[Node]:
        """Open a home and undo what dead commands left in it; `collect` what nothing needs.

        At the end the pager ends, if no instance needs it.
        """
        node = cls(await in_thread(open_parts, settings, reporter=reporter, driver=driver))
        await in_thread(node.paging.clear_dead)
        await reconcile(node.parts, node.instances, node.paging)
        await revive(node.parts, node.instances)
        await in_thread(node.paging.reconcile)
        if collect:
            await node.collect()
        try:
            yield node
        finally:
            await finish(in_thread(node.paging.close_unneeded))

    # images

    async def build_image(self, directory: Path, *, rebuild: bool = False) -> ImageInfo:
        """Build the image that DIR/function.toml names, or find it built."""
        spec = await in_thread(load_spec, directory)
        return await in_thread(
            self.parts.images.build, spec.image, progress=self.parts.reporter.say, rebuild=rebuild
        )

    async def remove_image(self, digest: str) -> ImageInfo:
        """Delete an image. Raises Conflict while a snapshot on this node needs it."""
        return await in_thread(self.catalogue.remove_image, digest)

    # functions

    async def deploy(self, directory: Path, *, name: str | None = None) -> Deployed:
        """Deploy the function in a directory; its name then points to the new revision."""
        return await self.deploy_spec(await in_thread(load_spec, directory, name=name))

    async def deploy_spec(self, spec: FunctionSpec) -> Deployed:
        """Deploy a function. Raises Conflict while another deploy of it runs, see Deployer."""
        try:
            with self._function_lock(spec.name):
                async with self._files_lock():
                    revision = await in_thread(next_revision, self.parts, spec.name)
                    before = await in_thread(self.remote.before, spec.name)
                    deployed = await self._deployer.deploy(spec, revision=revision)
                    digest = deployed.captured.snapshot.digest
                    reach("function made")
                    kept = Recipes(self.parts.journal).keeping(digest, recipe_of(spec))
                    self.parts.journal.set_ref(spec.name, digest, along=kept)
                    reach("function named")
                    self.remote.want_deployed(spec.name, digest, before)
        finally:  # the old revision, or what a failed deploy made
            await finish(self.collect())
        self.parts.events.publish("function.deployed", spec.name, snapshot=digest)
        return deployed

    async def start_cold(self, spec: FunctionSpec, timeline: Timeline) -> Instance:
        """Boot a function without any snapshot (for comparison); stop it with `stop_instance`."""
        async with self._files_lock():
            return await self._deployer.start_cold(spec, timeline)

    def functions(self) -> list[NamedSnapshot]:
        """The names that point to a function's snapshot."""
        return [
            named
            for named in self.snapshots()
            if named.names and named.snapshot.manifest.kind == "function"
        ]

    async def remove_function(self, name: str) -> list[str]:
        """Stop a function's instances and delete its name; the ids that were stopped.

        With `snapshots = "remote"` in the store too, if it is only there as well. Raises NotFound,
        Conflict for a name that is a plain snapshot's.
        """
        with self._function_lock(name):
            ref = self.parts.journal.ref(name)
            if ref is None:
                if await in_thread(self.remote.want_deleted, name):
                    return []
                raise NotFound(f"there is no function {name!r}", hint="`torpor ls` lists them")
            if await in_thread(self.catalogue.kind, ref.digest) == "instance":
                raise Conflict(
                    f"{name!r} is the name of a snapshot, not of a function",
                    hint=f"`torpor snapshot rm {name}` deletes it",
                )
            stopped = await self._stop_instances_of(name)
            reach("instances stopped")
            self.parts.journal.drop_ref(name)
            reach("name dropped")
            stopped += await self._stop_instances_of(name)  # woken in between
            await in_thread(self.remote.want_deleted, name)
        await self.collect()
        self.parts.events.publish("function.removed", name, stopped=stopped)
        return stopped

    async def invoke(
        self, name: str, request: Request, *, keep: bool = False, trace: bool = False
    ) -> Invoked:
        """Send one request to a function, waking an instance if none runs.

        Only instances of the snapshot that the name points to now are used, not those of older
        revisions, and none that is being ended. A woken instance is stopped again unless `keep`.
        `name` may be any ref or digest. `trace`: take apart where the time of a wake and its
        request went.
        """
        tracer = await self._tracer(trace)
        timeline = Timeline()
        answered = await self._asking.ask_running(name, request, timeline)
        if answered is not None:
            instance_id, response = answered
            return Invoked(response, instance_id, False, timeline)
        instance = await self._wake(name, timeline)
        try:
            ready_s = timeline.elapsed_s()
            with timeline.step("request"):
                response = await self._asking.ask(instance, request)
            if tracer is not None:
                instance.trace = await _traced(tracer, instance, ready_s)
        except BaseException:
            await finish(self.instances.destroy(instance.id, vmm=instance.vmm))
            raise
        if keep:
            await self.instances.release(instance)
        else:
            await finish(self.instances.stop(instance))
        return Invoked(response, instance.id, True, timeline, instance.trace)

    # instances

    async def restore(
        self,
        reference: str,
        *,
        kept: bool = False,
        expect: Digest | None = None,
        trace: bool = False,
    ) -> Instance:
        """Wake a snapshot by ref or digest, from this node or the store, and leave it running.

        `kept`: it is to end with this process; if that is killed, the next command removes it.
        `trace`: the instance gets a trace, which takes until its working set has been pushed.
        Raises Conflict when the reference means another snapshot than `expect`.
        """
        tracer = await self._tracer(trace)
        timeline = Timeline()
        instance = await self._wake(reference, timeline, expect=expect)
        if tracer is not None:
            try:
                instance.trace = await _traced(tracer, instance, timeline.elapsed_s())
            except BaseException:
                await finish(self.instances.destroy(instance.id, vmm=instance.vmm))
                raise
        await self.instances.release(instance, kept=kept)
        return instance

    async def stop(self, instance_id: str) -> str:
        """End an instance in order and remove all of it; its whole id.

        Waits for another command that is just removing it. Raises NotFound, Conflict.
        """
        (stopped,) = await self.stop_all([instance_id])
        return stopped

    async def stop_all(self, instance_ids: Sequence[str]) -> list[str]:
        """End several instances as `stop` does, none when one of them is not there.

        An instance that is named twice counts once.
        """
        doomed = list(dict.fromkeys(self.parts.journal.instance(id_).id for id_ in instance_ids))
        for instance_id in doomed:
            await self.instances.end(instance_id)
        return doomed

    async def stop_instance(self, instance: Instance) -> None:
        """End an instance that this object made."""
        await finish(self.instances.stop(instance))

    def console(self, instance_id: str, *, lines: int = 10_000) -> str:
        """What an instance's console printed."""
        row = self.parts.journal.instance(instance_id)
        return read_tail(self.parts.instances_dir / row.id / "console.log", lines)

    # snapshots

    async def create_snapshot(
        self, instance_id: str, *, name: str | None = None, trial: bool = False
    ) -> Captured:
        """Snapshot a running instance, which runs on; the snapshot gets a name.

        `trial`: then wake it twice, ask each clone for /, whatever it answers, and keep the working
        set. A trial that fails raises; the snapshot stays.
        """
        if name is not None:
            parse_name(name, what="snapshot name")
        row = self.parts.journal.instance(instance_id)
        name = name or row.id
        async with self._using_files():
            known = self.parts.journal.ref(name)
            if (
                known is not None
                and await in_thread(self.catalogue.kind, known.digest) == "function"
            ):
                raise Conflict(
                    f"{name!r} is the name of a function", hint="give another with --name"
                )
            captured = await self.capture_running(row)
            self.parts.journal.set_ref(name, captured.snapshot.digest)
            reach("snapshot named")
            self.remote.want(name, captured.snapshot.digest)
            if trial:
                self.parts.reporter.say(f"snapshot {name} is made; waking it twice for its trial")
                await self._trials.run(
                    captured.snapshot, lambda clone: self._asking.ask(clone, Request())
                )
        await self.collect()  # what had the name before
        digest = captured.snapshot.digest
        self.parts.events.publish("snapshot.created", name, snapshot=digest, instance=row.id)
        return captured

    async def fork(self, instance_id: str, *, count: int = 1) -> Forked:
        """Make `count` clones of a running instance, see `node.fork`."""
        async with self._using_files():
            return await fork(self, instance_id, count=count)

    def snapshots(self) -> list[NamedSnapshot]:
        """All snapshots on this node that can be read, those without a name too."""
        return self.catalogue.snapshots()

    async def inspect(self, reference: str) -> NamedSnapshot:
        """A snapshot on this node by ref, digest or a digest's beginning."""
        return await in_thread(self.catalogue.get, reference)

    async def verify(self, reference: str) -> NamedSnapshot:
        """Read every byte of a snapshot on this node. Raises Damaged naming the file."""
        return await in_thread(self.exchange.verify, reference)

    async def remove_snapshot(self, reference: str) -> Digest:
        """Delete a named snapshot. Raises Conflict for a function's: `rm` is for those."""
        digest = await in_thread(self.catalogue.remove_snapshot, reference)
        await in_thread(self.remote.want_deleted, reference)
        await self.collect()
        self.parts.events.publish("snapshot.removed", reference, snapshot=digest)
        return digest

    async def push(self, reference: str, *, name: str | None = None) -> TransferReport:
        """Send a snapshot to the store, under its own name or another. See Exchange."""
        return await in_thread(self.exchange.push, reference, name=name)

    async def pull(
        self, reference: str, *, expect: Digest | None = None
    ) -> tuple[NamedSnapshot, TransferReport]:
        """Fetch a snapshot from the store; a ref becomes a name on this node. See Exchange."""
        return await in_thread(self.exchange.pull, reference, expect=expect)

    async def export(self, reference: str, target: Path, *, name: str | None = None) -> Exported:
        """Write a snapshot with its images to an archive. See Exchange."""
        return await in_thread(self.exchange.export, reference, target, name=name)

    async def import_archive(
        self, source: Path, *, name: str | None = None, expect: Digest | None = None
    ) -> Imported:
        """Take over the snapshot of an archive. See Exchange."""
        return await in_thread(self.exchange.import_archive, source, name=name, expect=expect)

    async def collect(self) -> list[Unneeded]:
        """Delete snapshots that no name, base or instance needs, and apps that no snapshot needs.

        Never waits: skipped while others use snapshots. What was deleted.
        """
        return await collect(self.parts) or []

    # inside

    async def capture_running(self, row: InstanceRow) -> Captured:
        """Snapshot an instance that another command left running; it runs on.

        The caller holds the files lock, until the snapshot has a name or an instance.
        """
        self.parts.journal.claim_capture(row.id)
        try:
            instance = await self.instances.adopt(row)
            try:
                async with entered_in_thread(self.paging.copied(instance.parent)):
                    captured = await capture(
                        self.parts,
                        instance,
                        kind="instance",
                        function=instance.function,
                        then="resume",
                    )
                    await in_thread(self.paging.keep_images, captured.snapshot)
                return captured
            finally:
                await finish(instance.vmm.detach())
        finally:
            self.parts.journal.end_capture(row.id)
            if row.vmm is None or not row.vmm.is_alive():
                await finish(self.instances.destroy(row.id))

    async def _stop_instances_of(self, function: str) -> list[str]:
        rows = await in_thread(self.parts.journal.instances)
        doomed = [row.id for row in rows if row.function == function]
        for instance_id in doomed:
            await self.instances.end(instance_id)
        return doomed

    async def _wake(
        self, reference: str, timeline: Timeline, *, expect: Digest | None = None
    ) -> Instance:
        try:
            async with self._using_files():
                arrival = await self._arrivals.begin(reference, timeline, expect=expect)
                if arrival.snapshot.manifest.function is None:
                    raise InvalidInput(
                        f"{reference!r} is a base and has no function in it",
                        hint="restore a function or the snapshot of an instance",
                    )
                if self.parts.settings.snapshots == "off":
                    return await self._deployer.start_booted(await arrival.complete(), timeline)
                instance = await self.instances.wake(arrival, timeline)
                try:
                    await in_thread(self.paging.hydrate, arrival.snapshot)
                except BaseException:
                    await finish(self.instances.destroy(instance.id, vmm=instance.vmm))
                    raise
                return instance
        except BaseException:  # what was opened for it is needed no more
            await finish(in_thread(self.paging.close_unneeded))
            raise

    async def _tracer(self, wanted: bool) -> Tracer | None:
        return await in_thread(Tracer, self.paging) if wanted else None

    @contextlib.contextmanager
    def _function_lock(self, name: str) -> Iterator[None]:
        parse_name(name, what="function name")
        with exclusive(
            self.parts.locks_dir / f"function-{name}", timeout_s=0, what=f"function {name}"
        ):
            yield

    def _files_lock(self) -> contextlib.AbstractAsyncContextManager[None]:
        return entered_in_thread(self.parts.files_lock())

    @contextlib.asynccontextmanager
    async def _using_files(self) -> AsyncIterator[None]:
        """Hold the files lock; what the body made before it failed needs room for nothing."""
        try:
            async with self._files_lock():
                yield
        except BaseException:
            await finish(self.collect())
            raise


async def _traced(tracer: Tracer, instance: Instance, ready_s: float) -> Trace:
    assert instance.parent is not None
    return await in_thread(tracer.finish, instance.parent, instance.timeline, ready_s=ready_s)
