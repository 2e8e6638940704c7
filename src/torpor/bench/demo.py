"""`torpor demo`: the main job, shown and proved on two nodes, every figure measured in the run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torpor.errors import ProgramFailed
from torpor.host.cancel import in_thread
from torpor.host.process import run
from torpor.image.spec import load_spec
from torpor.node.invoke import Request, send_request
from torpor.node.leftovers import find_leftovers
from torpor.node.node import Node
from torpor.node.timeline import Timeline
from torpor.snapshot.repository.keys import new_key_line
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from torpor.config import Settings
    from torpor.node.live import Instance
    from torpor.node.parts import Reporter

_NAME = "ledger"
_TRAVELS = f"{_NAME}-travels"
_ROWS_ON_A = 3


@dataclass
class Demonstration:
    """Figures by name (seconds, bytes, ratios) and proofs: what was claimed, whether it held."""

    figures: dict[str, float] = field(default_factory=dict)
    proofs: dict[str, bool] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether every proof held."""
        return bool(self.proofs) and all(self.proofs.values())

    def prove(self, claim: str, held: bool, detail: str = "") -> None:
        """Record one proof with what was seen."""
        self.proofs[claim] = held
        self.details[claim] = detail


async def demonstrate(
    settings: Settings, *, function: Path, directory: Path, reporter: Reporter
) -> Demonstration:
    """Deploy on node A, let a snapshot travel through a store, wake it on node B, then on C.

    B wakes it while its memory arrives, C fetches it whole first, to compare. `directory` gets the
    homes `a`, `b` and `c` and the store; A's images and base are kept there for the next time, all
    else is new in each run and gone after it.
    """
    shown = Demonstration()
    home_a, home_b, home_c, store = (directory / name for name in ("a", "b", "c", "store"))
    for path in (home_b, home_c, store):
        shutil.rmtree(path, ignore_errors=True)
    url = settings.store or f"file://{store.absolute()}"
    shared = dataclasses.replace(settings, store=url, key=settings.key or new_key_line())
    node_a = dataclasses.replace(shared, home=home_a)
    node_b = dataclasses.replace(shared, home=home_b, lazy=True)
    node_c = dataclasses.replace(shared, home=home_c, lazy=False)
    try:
        await _on_node_a(node_a, function, shown, reporter)
        await _on_node_b(node_b, shown, reporter)
        await _on_node_c(node_c, shown, reporter)
        left = [
            line
            for settings in (node_a, node_b, node_c)
            for line in await in_thread(find_leftovers, settings)
        ]
        shown.prove("nothing is left on the host", not left, "; ".join(left))
    finally:
        for path in (home_b, home_c, store):
            shutil.rmtree(path, ignore_errors=True)
    return shown


async def _on_node_a(
    settings: Settings, function: Path, shown: Demonstration, reporter: Reporter
) -> None:
    spec = await in_thread(load_spec, function, name=_NAME)
    async with Node.open(settings, reporter=reporter) as node:
        await node.deploy_spec(spec)
        reporter.say("node A: booting the function without a snapshot, to compare")
        timeline = Timeline()
        instance = await node.start_cold(spec, timeline)
        async with _stopped_after(node, instance):
            await _ask(node, instance, Request())
            shown.figures["cold boot to first response_s"] = timeline.elapsed_s()
            shown.figures["boot_s"] = timeline.duration_s("boot")
        reporter.say("node A: waking the function, adding rows, snapshotting it, with a trial")
        instance = await node.restore(_NAME)
        async with _stopped_after(node, instance):
            for number in range(1, _ROWS_ON_A + 1):
                await _add_row(node, instance, number)
            captured = await node.create_snapshot(instance.id, name=_TRAVELS, trial=True)
            shown.figures["pause_s"] = captured.pause_s
            memory = captured.snapshot.manifest.memory
            shown.figures["memory that is not zero_bytes"] = memory.data_bytes
        reporter.say("node A: pushing the snapshot")
        report = await node.push(_TRAVELS)
        shown.figures["up_bytes"] = report.moved_bytes
        shown.figures["up_s"] = report.duration_s
        await node.remove_snapshot(_TRAVELS)
        await node.remove_function(_NAME)


async def _on_node_b(settings: Settings, shown: Demonstration, reporter: Reporter) -> None:
    async with Node.open(settings, reporter=reporter) as node:
        reporter.say("node B, which has nothing: waking it while its memory arrives")
        timeline = Timeline()
        instance = await node.restore(_TRAVELS)
        async with _stopped_after(node, instance, check_disk=shown):
            before = await _ask(node, instance, Request())
            shown.figures["remote wake to first response_s"] = timeline.elapsed_s()
            counted = await in_thread(node.paging.client.counters)
            shown.figures["fetched until then_bytes"] = counted["store"]["bytes"]
            number = await _add_row(node, instance, _ROWS_ON_A + 1)
            shown.prove(
                "the ledger continues at the next number on B",
                before["count"] == _ROWS_ON_A and number == _ROWS_ON_A + 1,
                f"{before['count']} rows came along, the next one got number {number}",
            )
            after = await _ask(node, instance, Request())
            shown.prove(
                "PRAGMA integrity_check says ok in the guest",
                after["integrity"] == "ok" and after["count"] == _ROWS_ON_A + 1,
                str(after["integrity"]),
            )
    cold = shown.figures["cold boot to first response_s"]
    shown.figures["cold boot/remote wake"] = cold / shown.figures["remote wake to first response_s"]


async def _on_node_c(settings: Settings, shown: Demonstration, reporter: Reporter) -> None:
    async with Node.open(settings, reporter=reporter) as node:
        reporter.say("node C, which has nothing: fetching it whole, waking it")
        timeline = Timeline()
        _, report = await node.pull(_TRAVELS)
        instance = await node.restore(_TRAVELS)
        async with _stopped_after(node, instance):
            await _ask(node, instance, Request())
            shown.figures["fetched whole, to first response_s"] = timeline.elapsed_s()
            shown.figures["fetched whole_bytes"] = report.moved_bytes
        async with _stopped_after(node, await _timed_wake(node, shown)):
            pass


async def _timed_wake(node: Node, shown: Demonstration) -> Instance:
    timeline = Timeline()
    instance = await node.restore(_TRAVELS)
    try:
        await _ask(node, instance, Request())
    except BaseException:
        await finish(node.instances.destroy(instance.id, vmm=instance.vmm))
        raise
    shown.figures["local wake to first response_s"] = timeline.elapsed_s()
    return instance


@contextlib.asynccontextmanager
async def _stopped_after(
    node: Node, instance: Instance, *, check_disk: Demonstration | None = None
) -> AsyncIterator[None]:
    """Shut the instance down after the body, look at its disk if asked, then remove it."""
    try:
        yield
        await node.instances.shut_down(instance)
        if check_disk is not None:
            clean, words = await in_thread(_check_disk, instance.directory / "scratch")
            check_disk.prove("e2fsck -fn of B's scratch disk is clean", clean, words)
    finally:
        await finish(node.instances.destroy(instance.id, vmm=instance.vmm))


def _check_disk(scratch: Path) -> tuple[bool, str]:
    try:
        return True, run(["e2fsck", "-fn", scratch], timeout_s=60).strip().splitlines()[-1]
    except ProgramFailed as error:
        return False, str(error)


async def _add_row(node: Node, instance: Instance, number: int) -> int:
    body = json.dumps({"amount": number * 100, "note": f"row {number}"}).encode()
    headers = (("Content-Type", "application/json"),)
    return int((await _ask(node, instance, Request("POST", "/", headers, body)))["number"])


async def _ask(node: Node, instance: Instance, request: Request) -> dict[str, Any]:
    assert instance.function is not None
    response = await in_thread(
        send_request,
        instance.address,
        instance.function.port,
        request,
        timeout_s=node.parts.settings.request_timeout_s,
    )
    return dict(json.loads(response.body))
