"""The main job: asleep here, awake there."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.nodes import ask, running
from torpor.errors import Conflict
from torpor.host.cancel import in_thread
from torpor.host.process import run
from torpor.image.agent import AgentClient
from torpor.node import instance as instance_module
from torpor.node.invoke import Request
from torpor.node.node import Node
from torpor.units import Digest

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.config import Settings

pytestmark = pytest.mark.vm


async def test_travels_to_a_node_that_has_nothing(node: Node, fresh_settings: Settings) -> None:
    """Rows added on A are there on B, which takes the snapshot from the store alone."""
    async with running(node, "ledger") as instance:
        for amount in (100, 200, 300):
            await ask(instance, "POST", body={"amount": amount, "note": "on A"})
        await node.create_snapshot(instance.id, name="travels")
    await node.push("travels")
    await node.remove_snapshot("travels")
    async with Node.open(fresh_settings) as other:
        await other.pull("travels")
        instance = await other.restore("travels")
        added = await ask(instance, "POST", body={"amount": 400, "note": "on B"})
        seen = await ask(instance)
        await other.instances.shut_down(instance)
        run(["e2fsck", "-fn", instance.directory / "scratch"])
        await other.instances.destroy(instance.id)
        assert (added["number"], seen["count"], seen["sum"]) == (4, 4, 1000)
        assert seen["integrity"] == "ok"


@pytest.mark.minio
async def test_travels_through_minio(
    node: Node, fresh_settings: Settings, minio_settings: Settings
) -> None:
    """The same through a real S3 server: `restore` on B wakes it while its memory arrives."""
    parts = replace(node.parts, settings=replace(minio_settings, home=node.parts.settings.home))
    await Node(parts).push("hello")
    async with Node.open(replace(minio_settings, home=fresh_settings.home)) as other:
        async with running(other, "hello") as instance:
            answer = await ask(instance)
            assert instance.parent is not None
            assert instance.parent.served is not None
        assert answer["instance"] == instance.id


async def test_travels_in_a_file(node: Node, fresh_settings: Settings, tmp_path: Path) -> None:
    """Exported on A, imported on B, where there is no store: it wakes there and answers.

    Another snapshot than the expected one is not woken.
    """
    exported = await node.export("hello", tmp_path / "hello.tar")
    async with Node.open(replace(fresh_settings, store="")) as other:
        await other.import_archive(tmp_path / "hello.tar")
        with pytest.raises(Conflict, match="hello on this node is snapshot"):
            await other.restore("hello", expect=Digest("0" * 64))
        instance = await other.restore("hello", expect=exported.digest)
        answer = await ask(instance)
        await other.stop_instance(instance)
    assert answer["instance"] == instance.id


async def test_invoke_wakes_answers_and_leaves_nothing(node: Node) -> None:
    """Without --keep a woken instance is gone after its answer; with it the next one finds it."""
    first = await node.invoke("hello", Request())
    assert first.woken
    assert node.parts.journal.instances() == []
    second = await node.invoke("hello", Request(), keep=True)
    third = await node.invoke("hello", Request())
    assert (second.woken, third.woken) == (True, False)
    assert second.instance_id == third.instance_id
    assert json.loads(third.response.body)["instance"] == second.instance_id
    await node.stop(second.instance_id)


async def test_ten_generations(node: Node) -> None:
    """Every row committed in any of ten generations is there at the end, disk and file sound."""
    name = "ledger"
    for generation in range(1, 11):
        async with running(node, name) as instance:
            for _ in range(2):
                await ask(instance, "POST", body={"amount": generation, "note": "row"})
            captured = await node.create_snapshot(instance.id, name=f"generation-{generation}")
        name = f"generation-{generation}"
    instance = await node.restore(captured.snapshot.digest)
    seen = await ask(instance)
    await node.instances.shut_down(instance)
    run(["e2fsck", "-fn", instance.directory / "scratch"])
    await node.instances.destroy(instance.id)
    for generation in range(1, 11):
        await node.remove_snapshot(f"generation-{generation}")
    assert (seen["count"], seen["sum"]) == (20, 2 * sum(range(1, 11)))
    assert seen["integrity"] == "ok"


async def test_eight_clones_differ_in_all_that_must(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clones of one snapshot, made with the clock a year back, share no identity and no entropy.

    Their clocks are right though each wake was late, and set a clock of three seconds ago.
    """
    shifted = time.time_ns() - 365 * 86400 * 10**9
    monkeypatch.setattr(instance_module, "clock_ns", lambda: shifted)
    async with running(node, "hello") as instance:
        assert abs((await ask(instance))["time"] - shifted / 1e9) < 60
        await node.create_snapshot(instance.id, name="shifted")
    monkeypatch.undo()
    monkeypatch.setattr(AgentClient, "wake", _wake_late)
    clones = await asyncio.gather(*(node.restore("shifted") for _ in range(8)))
    try:
        answers, skews = [], []
        for clone in clones:
            before = time.time()
            answers.append(await ask(clone))
            skews.append((before - answers[-1]["time"], answers[-1]["time"] - time.time()))
    finally:
        await asyncio.gather(*(node.stop_instance(clone) for clone in clones))
        await node.remove_snapshot("shifted")
    for key in ("hostname", "instance", "random"):
        assert len({answer[key] for answer in answers}) == 8, key
    assert len({clone.address for clone in clones}) == 8
    assert all(early < 1 and late < 1 for early, late in skews), skews  # of a year


_wake_at_once = AgentClient.wake


def _wake_late(agent: AgentClient, *, time_ns: int, **more: Any) -> None:  # noqa: ANN401
    _wake_at_once(agent, time_ns=time_ns - 3 * 10**9, **more)
    time.sleep(1.2 * instance_module.CLOCK_LATE_S)


async def test_stop_ends_the_process_and_logs_tell_the_console(node: Node) -> None:
    """`logs` shows what the guest printed; `stop` ends the VM of another command's making."""
    instance = await node.restore("hello")
    process = instance.vmm.process
    assert process is not None
    row = node.parts.journal.instance(instance.id)
    assert (row.state, row.address) == ("running", instance.address)
    assert await in_thread(node.console, instance.id) is not None
    await node.stop(instance.id[:10])
    assert not process.is_alive()
    assert not instance.directory.exists()


async def test_redeploy_makes_a_new_revision(node: Node, deployed: Settings) -> None:
    """Deploying again counts the revision up, reuses the base and drops the old snapshot."""
    from fixtures.nodes import EXAMPLES

    first = await node.deploy(EXAMPLES / "hello", name="again")
    second = await node.deploy(EXAMPLES / "hello", name="again")
    await node.remove_function("again")
    assert (first.revision, second.revision) == (1, 2)
    assert second.base_reused
    digests = {named.snapshot.digest for named in node.snapshots()}
    assert not digests & {first.captured.snapshot.digest, second.captured.snapshot.digest}
