"""One instance: made by booting or by restoring, woken, and removed without a trace.

Order of making: journal row, directory, slot, files, VMM process, resume, wake; the order of
removal is the reverse, and the row goes last. Whatever is interrupted in between is found by the
row and undone by `reconcile`.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

from torpor.errors import (
    DeadlineExceeded,
    GuestFailed,
    NotFound,
    TorporError,
    VmmFailed,
)
from torpor.host.barrier import reach
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.host.process import find_processes_in
from torpor.host.sparse import fill_sparse
from torpor.image.kernel import KERNEL_CMDLINE
from torpor.image.scratch import make_empty_app, make_scratch
from torpor.node.arrival import Arrival
from torpor.node.claims import CLAIM_WAIT_S, Claims
from torpor.node.fitting import check_fits
from torpor.node.live import Instance
from torpor.node.paging import Coming, Files
from torpor.node.parts import log
from torpor.node.timeline import Timeline
from torpor.vmm.interface import VmConfig, Vmm, VmmState, finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from torpor.image.agent import AgentClient
    from torpor.net.registry import Slot
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.paging import Paging
    from torpor.node.parts import Parts
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.manifest import Function, Machine
    from torpor.units import Digest
    from torpor.vmm.interface import Driver

T = TypeVar("T")

_STOP_TIMEOUT_S = 10.0
CLOCK_LATE_S: Final = 0.25
"""After a wake that takes longer the clock is set again."""
_CLOCK_TRIES = 5


def new_instance_id(prefix: str) -> str:
    """A fresh id; it is also the guest's hostname."""
    return f"{prefix[:40].replace('.', '-').strip('-')}-{secrets.token_hex(4)}"


def clock_ns() -> int:
    """The time that guests are woken with: this host's CLOCK_REALTIME."""
    return time.time_ns()


class Instances:
    """Makes and removes the instances of one node."""

    def __init__(self, parts: Parts, paging: Paging) -> None:
        self._parts = parts
        self._paging = paging
        self._claims = Claims(parts)

    async def boot(
        self,
        machine: Machine,
        image: Digest,
        *,
        app: Path | None = None,
        label: str = "base",
        timeline: Timeline | None = None,
        function: Function | None = None,
        snapshot: str = "",
    ) -> Instance:
        """Boot the image and wait for its agent. Without `app` its disk is an empty placeholder.

        `function` is what the caller is about to start in it, `snapshot` the digest of the one that
        it could have been woken from. Raises VmmFailed, GuestFailed, HostUnfit, NoSpace; nothing is
        left of a failed boot.
        """
        timeline = timeline or Timeline()
        async with self._making(
            label, function=function, snapshot=snapshot, timeline=timeline, booted=True
        ) as making:
            directory = making.directory
            with timeline.step("files"):
                await in_thread(make_scratch, directory / "scratch", machine.scratch_bytes)
                await in_thread(_make_zeros, directory / "memory", machine.memory_bytes)
                if app is None:
                    await in_thread(make_empty_app, directory / "app", machine.app_bytes)
            files = Files(
                directory / "memory",
                self._parts.images.path(image),
                app or directory / "app",
                paged=False,
            )
            config = self._config(making, machine, files)
            instance = making.become(self._parts.driver.create(config), machine, image, None)
            with timeline.step("boot"):
                await instance.vmm.boot()
                self._record_process(instance)
                await instance.with_agent(
                    lambda agent: agent.ping(), timeout_s=self._parts.settings.boot_timeout_s
                )
            await self._wake(instance)
            return instance

    async def restore(
        self,
        snapshot: LocalSnapshot,
        *,
        app: Path | None = None,
        files: Files | None = None,
        label: str = "",
        timeline: Timeline | None = None,
    ) -> Instance:
        """Make an instance from a snapshot of this node; it is ready when this returns.

        `app` is the app disk to attach to a base; `files` are to be used in place of the
        snapshot's own, which hold the same. Raises Incompatible before anything is made, then as
        `boot` does; each names the window when the pager could not get one.
        """
        timeline = timeline or Timeline()
        arrival = Arrival(Coming.of(snapshot))
        return await self._restore(arrival, app=app, files=files, label=label, timeline=timeline)

    async def wake(self, arrival: Arrival, timeline: Timeline) -> Instance:
        """`restore` of a snapshot that may be on its way: the VMM is started meanwhile.

        Raises what kept it from coming, too.
        """
        try:
            return await self._restore(arrival, timeline=timeline)
        except (TorporError, OSError):  # its files may be gone because it could not be opened
            await arrival.complete()
            raise

    async def _restore(
        self,
        arrival: Arrival,
        *,
        timeline: Timeline,
        app: Path | None = None,
        files: Files | None = None,
        label: str = "",
    ) -> Instance:
        snapshot = arrival.snapshot
        manifest = snapshot.manifest
        with timeline.step("check"):
            await in_thread(check_fits, self._parts, self._paging, snapshot)
        function = manifest.function
        label = label or (function.name if function else "base")
        async with self._making(
            label, function=function, snapshot=snapshot.digest, timeline=timeline
        ) as making:
            await in_thread(_make_zeros, making.directory / "scratch", manifest.disk.size_bytes)
            if function is None and app is None:
                app = making.directory / "app"
                await in_thread(make_empty_app, app, manifest.machine.app_bytes)
            if files is None:
                files = await in_thread(self._paging.files_of, snapshot, app)
            config = self._config(making, manifest.machine, files)
            driver = self._parts.driver_of(manifest)
            instance = making.become(
                driver.create(config), manifest.machine, manifest.image, snapshot
            )
            try:
                await self._start_restored(instance, arrival, files)
            except (VmmFailed, GuestFailed, DeadlineExceeded) as error:
                raise await in_thread(self._paging.explain, error, snapshot) from None
            return instance

    async def _start_restored(self, instance: Instance, arrival: Arrival, files: Files) -> None:
        timeline, snapshot = instance.timeline, arrival.snapshot
        await in_thread(self._paging.note_files, instance.directory, files)
        async with entered_in_thread(self._paging.pushed(snapshot, files)):
            with timeline.step("vmm start"):
                await instance.vmm.start()
            reach("vmm started")
            self._record_process(instance)
        instance.parent = snapshot = await arrival.complete()
        with timeline.step("scratch"):
            await in_thread(fill_sparse, snapshot.disk, instance.directory / "scratch")
        with timeline.step("load"):
            await instance.vmm.load(snapshot.vmstate)
        with timeline.step("resume"):
            await instance.vmm.resume()
        reach("vmm resumed")
        await self._wake(instance)

    async def adopt(self, row: InstanceRow) -> Instance:
        """Take over a running instance that another command left running."""
        making, config, driver, snapshot = await self._parts_of(row)
        assert row.vmm is not None
        vmm = await driver.adopt(config, row.vmm)
        manifest = snapshot.manifest
        parent = None if row.booted else snapshot
        return making.become(vmm, manifest.machine, manifest.image, parent)

    async def stands_still(self, row: InstanceRow) -> bool:
        """Whether a running instance stands still since it found the disk full.

        Raises what `adopt` raises.
        """
        _, config, driver, _ = await self._parts_of(row)
        assert row.vmm is not None
        return await driver.stands_still(config, row.vmm)

    async def revive(self, row: InstanceRow) -> bool:
        """Let a running instance go on that found the disk full; whether it had stood still.

        Raises what `adopt` raises.
        """
        _, config, driver, _ = await self._parts_of(row)
        assert row.vmm is not None
        return await driver.revive(config, row.vmm)

    async def _parts_of(self, row: InstanceRow) -> tuple[_Making, VmConfig, Driver, LocalSnapshot]:
        snapshot = await in_thread(self._parts.snapshots.get, row.snapshot)
        if row.vmm is None or row.slot is None:
            raise NotFound(f"instance {row.id} is not running")
        manifest = snapshot.manifest
        slot = await in_thread(self._parts.slots.get, row.slot)
        directory = self._parts.instances_dir / row.id
        making = _Making(row.id, directory, slot, manifest.function, Timeline())
        files = await in_thread(self._paging.files_of_instance, directory, snapshot)
        if row.booted:
            files = replace(files, memory=directory / "memory", paged=False)
        config = self._config(making, manifest.machine, files)
        driver = self._parts.driver if row.booted else self._parts.driver_of(manifest)
        return making, config, driver, snapshot

    async def thaw(self, row: InstanceRow) -> None:
        """Let a running instance go on whose snapshot was never finished: its command was killed.

        Raises Conflict while another command does the same, what `adopt` raises.
        """
        self._parts.journal.claim_capture(row.id)
        instance = await self.adopt(row)
        try:
            if instance.vmm.state is VmmState.PAUSED:
                await instance.vmm.resume()
        finally:
            await finish(instance.vmm.detach())
        self._parts.journal.end_capture(row.id)

    async def release(self, instance: Instance, *, kept: bool = False) -> None:
        """Leave an instance running for later commands; `kept`: until this process ends.

        If that fails or is cancelled nothing is left of the instance.
        """
        try:
            reach("instance woken")
            self._parts.journal.set_running(instance.id, kept=kept)
            reach("instance running")
            await instance.vmm.detach()
        except BaseException:
            await finish(self.destroy(instance.id, vmm=instance.vmm))
            raise
        self._parts.making.discard(instance.id)
        self._parts.events.publish(
            "instance.ready",
            instance.id,
            function=instance.function.name if instance.function else "",
            ready_s=instance.timeline.elapsed_s(),
            steps_s=instance.timeline.to_dict(),
        )

    async def shut_down(self, instance: Instance) -> None:
        """End the function, unmount its disk and end the VM; the instance's files stay.

        A guest that does not answer is ended all the same.
        """
        try:
            await instance.with_agent(
                lambda agent: agent.stop(timeout_s=_STOP_TIMEOUT_S), timeout_s=2 * _STOP_TIMEOUT_S
            )
        except TorporError as error:
            log.warning("instance was not shut down in order id=%s error=%s", instance.id, error)
        await instance.vmm.stop()

    async def stop(self, instance: Instance) -> None:
        """Shut an instance down and remove everything of it, as `end` does."""
        async with self._claims.removal(instance.id) as row:
            if row is not None:
                await finish(self._shut_down_and_remove(instance, row))

    async def end(self, instance_id: str) -> None:
        """Shut an instance down that another command left running, and remove everything of it.

        Idempotent. While another live command, or another task of this process, makes, snapshots or
        removes it this waits for that; Conflict when it takes too long. Requests that `node.asking`
        has sent to it may end before, for some seconds.
        """
        await self._claims.await_made(instance_id)
        async with self._claims.removal(instance_id) as row:
            if row is not None:
                await finish(self._end(row))

    async def destroy(
        self, instance_id: str, *, vmm: Vmm | None = None, wait_s: float = CLAIM_WAIT_S
    ) -> None:
        """Remove everything of an instance from the host, in whatever state it is.

        Idempotent, and not to be stopped half-way by a cancellation. Raises Conflict when another
        live command is still making, snapshotting or removing it after `wait_s`.
        """
        async with self._claims.removal(instance_id, wait_s=wait_s) as row:
            await finish(self._destroy(row, vmm))

    async def _end(self, row: InstanceRow) -> None:
        if row.state == "running":
            await self._claims.await_answered(row.id)
            try:
                instance = await self.adopt(row)
            except TorporError as error:  # it cannot be told to end any more
                log.warning("instance does not answer id=%s error=%s", row.id, error)
            else:
                await self._shut_down_and_remove(instance, row)
                return
        await in_thread(self._remove, row)

    async def _shut_down_and_remove(self, instance: Instance, row: InstanceRow) -> None:
        reach("stop claimed")
        await self.shut_down(instance)
        reach("vmm ended")
        await in_thread(self._remove, row)

    async def _destroy(self, row: InstanceRow | None, vmm: Vmm | None) -> None:
        if vmm is not None:
            await vmm.stop()
        if row is not None:
            await in_thread(self._remove, row)

    def _remove(self, row: InstanceRow) -> None:
        directory = self._parts.instances_dir / row.id
        if row.vmm is not None:
            row.vmm.kill()
        for process in find_processes_in(directory):
            process.kill()
        self._parts.slots.release_instance(self._parts.settings.home, row.id)
        reach("slot released")
        shutil.rmtree(directory, ignore_errors=True)
        self._parts.journal.drop_instance(row.id)
        self._parts.making.discard(row.id)
        log.info("instance removed id=%s", row.id)
        self._parts.events.publish("instance.removed", row.id, function=row.function)
        self._paging.close_unneeded()

    @contextlib.asynccontextmanager
    async def _making(
        self,
        label: str,
        *,
        function: Function | None,
        snapshot: str,
        timeline: Timeline,
        booted: bool = False,
    ) -> AsyncIterator[_Making]:
        """Row, directory and slot of a new instance; all of it goes again if the body fails."""
        instance_id = new_instance_id(label)
        journal = self._parts.journal
        journal.add_instance(
            instance_id,
            function=function.name if function else "",
            snapshot=snapshot,
            port=function.port if function else 0,
            booted=booted,
        )
        self._parts.making.add(instance_id)
        reach("instance recorded")
        making: _Making | None = None
        try:
            directory = self._parts.instances_dir / instance_id
            await in_thread(directory.mkdir, 0o700)
            with timeline.step("slot"):
                slot = await in_thread(
                    self._parts.slots.allocate, self._parts.settings.home, instance_id
                )
            reach("slot allocated")
            journal.set_slot(instance_id, slot.number, str(slot.addresses.clone_ip))
            making = _Making(instance_id, directory, slot, function, timeline)
            yield making
        except BaseException:
            made = making.instance if making else None
            await finish(self.destroy(instance_id, vmm=made.vmm if made else None))
            self._parts.making.discard(instance_id)
            raise

    def _config(self, making: _Making, machine: Machine, files: Files) -> VmConfig:
        boot = self._parts.boot_files()
        assert files.app is not None
        return VmConfig(
            directory=making.directory,
            machine=machine,
            kernel=boot.kernel,
            vmlinux=boot.vmlinux,
            initramfs=boot.initramfs,
            command_line=KERNEL_CMDLINE,
            memory=files.memory,
            image=files.image,
            scratch=making.directory / "scratch",
            app=files.app,
            paged=files.paged,
            namespace=making.slot.addresses.namespace,
            tap=making.slot.addresses.tap,
            guest_mac=making.slot.addresses.guest_mac,
        )

    def _record_process(self, instance: Instance) -> None:
        process = instance.vmm.process
        assert process is not None
        self._parts.journal.set_vmm(instance.id, process)

    async def _wake(self, instance: Instance) -> None:
        """Clock, entropy, identity, hooks; before it no clone may serve."""
        timeout_s = self._parts.settings.boot_timeout_s
        with instance.timeline.step("wake"):
            await instance.with_agent(lambda agent: _wake(agent, instance.id), timeout_s=timeout_s)


@dataclass
class _Making:
    """An instance on its way: what exists of it so far."""

    id: str
    directory: Path
    slot: Slot
    function: Function | None
    timeline: Timeline
    instance: Instance | None = None

    def become(
        self, vmm: Vmm, machine: Machine, image: Digest, parent: LocalSnapshot | None
    ) -> Instance:
        """The instance, now that there is a VM for it."""
        self.instance = Instance(
            id=self.id,
            directory=self.directory,
            vmm=vmm,
            slot=self.slot,
            function=self.function,
            machine=machine,
            image=image,
            parent=parent,
            timeline=self.timeline,
        )
        return self.instance


def _wake(agent: AgentClient, instance_id: str) -> None:
    """Wake a guest. Its clock is late by what that took, at most: it is set again after long."""
    asked_at = time.monotonic()
    agent.wake(
        time_ns=clock_ns(),
        entropy=secrets.token_bytes(64),
        hostname=instance_id,
        instance_id=instance_id,
    )
    for _ in range(_CLOCK_TRIES):
        if time.monotonic() - asked_at <= CLOCK_LATE_S:
            return
        asked_at = time.monotonic()
        if not agent.set_clock(time_ns=clock_ns()):
            return


def _make_zeros(path: Path, size_bytes: int) -> None:
    with path.open("wb") as stream:
        stream.truncate(size_bytes)
