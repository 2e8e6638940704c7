"""Requests to the instances of a node: who is asked, that nobody ends it meanwhile, why one failed.

Who asks an instance that runs marks its directory as in use and then looks whether it runs still.
Who ends one in order says so in the journal and then waits for a while for those that ask it. So no
request is sent to what is being ended, by whatever process, and none is cut off that ends soon.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torpor.errors import DeadlineExceeded, FunctionFailed, NotFound, TorporError, VmmFailed
from torpor.host.cancel import in_thread
from torpor.host.lock import in_use
from torpor.node.console import read_tail
from torpor.node.invoke import send_while_alive
from torpor.node.stalls import check_goes_on
from torpor.units import Digest

if TYPE_CHECKING:
    from torpor.host.process import ProcessId
    from torpor.node.catalogue import Catalogue
    from torpor.node.instance import Instances
    from torpor.node.invoke import Request, Response
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.live import Instance
    from torpor.node.paging import Paging
    from torpor.node.parts import Parts
    from torpor.node.timeline import Timeline


class Asking:
    """Sends requests. Belongs to one asyncio loop.

    Failures are FunctionFailed with the end of the console, DeadlineExceeded, VmmFailed, NoSpace
    for an instance that stands still, or name the window that could not be had.
    """

    def __init__(
        self, parts: Parts, instances: Instances, catalogue: Catalogue, paging: Paging
    ) -> None:
        self._parts = parts
        self._instances = instances
        self._catalogue = catalogue
        self._paging = paging

    async def ask_running(
        self, reference: str, request: Request, timeline: Timeline
    ) -> tuple[str, Response] | None:
        """Ask an instance that runs of just the snapshot that the reference means now.

        Its id and answer, or None when there is none, or none that is not being ended.
        """
        for row in await in_thread(self._running, reference):
            with in_use(self._parts.instances_dir / row.id) as usable:
                if not usable or not await in_thread(self._still_runs, row):
                    continue
                await check_goes_on(self._parts, self._instances, row.id)
                with timeline.step("request"):
                    answer = await self._send(row.vmm, row.address, row.port, request, row.id)
                return row.id, answer
        return None

    async def ask(self, instance: Instance, request: Request) -> Response:
        """Ask an instance that this process has."""
        assert instance.function is not None
        vmm, port = instance.vmm.process, instance.function.port
        return await self._send(vmm, instance.address, port, request, instance.id)

    def _running(self, reference: str) -> list[InstanceRow]:
        snapshot = self._catalogue.find(reference)
        if snapshot is None:
            return []
        rows = self._parts.journal.instances()
        return [row for row in rows if row.snapshot == snapshot.digest and row.state == "running"]

    def _still_runs(self, row: InstanceRow) -> bool:
        with contextlib.suppress(NotFound):
            return self._parts.journal.instance(row.id).state == "running"
        return False

    async def _send(
        self, vmm: ProcessId | None, address: str, port: int, request: Request, instance_id: str
    ) -> Response:
        timeout_s = self._parts.settings.request_timeout_s
        try:
            return await send_while_alive(vmm, address, port, request, timeout_s=timeout_s)
        except (FunctionFailed, DeadlineExceeded, VmmFailed) as error:
            await check_goes_on(self._parts, self._instances, instance_id)
            explained = await in_thread(self._explain, error, instance_id)
            if explained is not error:
                raise explained from None
            if not isinstance(error, FunctionFailed):
                raise
            tail = read_tail(self._parts.instances_dir / instance_id / "console.log", 12)
            raise FunctionFailed(
                error.message, reason=f"{error.reason}\n{tail}".strip(), hint=error.hint
            ) from None

    def _explain(self, error: TorporError, instance_id: str) -> TorporError:
        """Why a request failed, if it is because a window could not be had; else the same error."""
        try:
            row = self._parts.journal.instance(instance_id)
            snapshot = self._parts.snapshots.get(Digest(row.snapshot)) if row.snapshot else None
        except NotFound:  # another command has removed it meanwhile
            return error
        if snapshot is None or row.vmm is None:
            return error
        plain = error
        if not row.vmm.is_alive():
            plain = VmmFailed(f"the VM of {row.id} ended during a request")
        explained = self._paging.explain(plain, snapshot)
        return error if explained is plain else explained
