"""Revisions, names, and what stays on the disk."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest

from fixtures.gateways import wait_for
from fixtures.nodes import EXAMPLES, running, write_function
from torpor.errors import Conflict, Damaged, FunctionFailed, NotFound
from torpor.host.lock import shared
from torpor.node.invoke import Request
from torpor.node.leftovers import find_leftovers
from torpor.node.node import Node

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.config import Settings

pytestmark = pytest.mark.vm


def kept_files(node: Node) -> set[str]:
    """Digests of the snapshots, images and apps on a node."""
    return {
        *(named.snapshot.digest for named in node.snapshots()),
        *(info.digest for info in node.parts.images.list()),
    }


async def test_invocations_use_the_revision_that_was_deployed_last(
    node: Node, tmp_path: Path
) -> None:
    """A new revision is asked at once; instances of the old one run on until they are stopped."""
    before = kept_files(node)
    source = shutil.copytree(EXAMPLES / "hello", tmp_path / "twice")
    await node.deploy(source, name="twice")
    old = await node.restore("twice")
    assert (await node.invoke("twice", Request())).instance_id == old.id
    (program,) = source.glob("*.py")
    program.write_text(program.read_text() + "\n# another app\n")
    await node.deploy(source, name="twice")
    invoked = await node.invoke("twice", Request(), keep=True)
    assert invoked.woken
    assert (await node.invoke("twice", Request())).instance_id == invoked.instance_id
    assert {row.id for row in node.parts.journal.instances()} == {old.id, invoked.instance_id}
    assert sorted(await node.remove_function("twice")) == sorted([old.id, invoked.instance_id])
    assert kept_files(node) == before


async def test_instances_of_a_snapshot_do_not_serve_its_function(node: Node) -> None:
    """What was restored from a snapshot of an instance is asked by that name only."""
    async with running(node, "hello") as instance:
        await node.create_snapshot(instance.id, name="aside")
    async with running(node, "aside") as other:
        assert (await node.invoke("aside", Request())).instance_id == other.id
        assert (await node.invoke("hello", Request())).instance_id != other.id
    await node.remove_snapshot("aside")


async def test_names_of_functions_and_of_snapshots(node: Node) -> None:
    """`rm` refuses a snapshot's name, `snapshot rm` a function's; nothing is lost by that."""
    async with running(node, "hello") as instance:
        await node.create_snapshot(instance.id, name="aside")
        with pytest.raises(Conflict, match="not of a function") as caught:
            await node.remove_function("aside")
        assert "torpor snapshot rm aside" in caught.value.hint
        with pytest.raises(Conflict, match="is the name of a function"):
            await node.create_snapshot(instance.id, name="hello")
        with pytest.raises(Conflict, match="not of a function"):
            await node.deploy(EXAMPLES / "hello", name="aside")
    ref = node.parts.journal.ref("hello")
    assert ref is not None
    for reference in ("hello", ref.digest, ref.digest[:8]):
        with pytest.raises(Conflict, match="snapshot of function 'hello'") as caught:
            await node.remove_snapshot(reference)
        assert "torpor rm hello" in caught.value.hint
    await node.remove_snapshot("aside")
    assert node.parts.journal.ref("aside") is None
    assert (await node.invoke("hello", Request())).response.status == 200


async def test_deploy_that_fails_at_its_proof_keeps_nothing(node: Node, tmp_path: Path) -> None:
    """A function whose snapshot does not answer: neither snapshot nor app stays on the disk."""
    before = kept_files(node)
    program = """
import http.server

class Once(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Once.asked += 1
        self.send_response(200 if Once.asked == 1 else 500)
        self.end_headers()

http.server.HTTPServer(("", 8080), Once).serve_forever()
"""
    directory = write_function(tmp_path / "once", program, 'warmup = [{ path = "/" }]')
    with pytest.raises(FunctionFailed, match="answered its warm-up GET / with 500"):
        await node.deploy(directory)
    assert node.parts.journal.ref("once") is None
    assert kept_files(node) == before


async def test_opening_a_home_collects_what_nothing_needs(node: Node) -> None:
    """What a killed deploy left is deleted when the home is opened next, unless it is in use."""
    before = kept_files(node)
    settings = node.parts.settings
    deployed = await node.deploy(EXAMPLES / "hello", name="lost")
    instance = await node.restore("lost")
    node.parts.journal.drop_ref("lost")
    async with Node.open(settings):  # an instance needs it
        assert deployed.captured.snapshot.digest in kept_files(node)
    await node.stop_instance(instance)
    with shared(node.parts.locks_dir / "files", timeout_s=0, what="files"):
        async with Node.open(settings):  # somebody is at work: not now
            assert deployed.captured.snapshot.digest in kept_files(node)
    async with Node.open(settings):
        assert kept_files(node) == before


async def test_snapshot_that_was_pulled_by_its_digest_stays(
    node: Node, fresh_settings: Settings
) -> None:
    """Fetched on purpose, it is there for later commands, has no name, and can be deleted."""
    await node.push("hello")
    ref = node.parts.journal.ref("hello")
    assert ref is not None
    async with Node.open(fresh_settings) as other:
        await other.pull(ref.digest)
    async with Node.open(fresh_settings) as other:
        (named,) = other.snapshots()
        assert (named.snapshot.digest, named.names) == (ref.digest, ())
        assert (await other.invoke(ref.digest, Request())).response.status == 200
        await other.remove_snapshot(ref.digest)
        assert other.snapshots() == []


async def test_instances_removed_from_several_sides(node: Node) -> None:
    """Every remover of an instance succeeds, one after the other or all at once."""
    instance = await node.restore("hello")
    await asyncio.gather(
        node.stop(instance.id),
        node.stop(instance.id),
        node.stop_instance(instance),
        node.instances.destroy(instance.id),
    )
    assert find_leftovers(node.parts.settings) == []
    with pytest.raises(NotFound):
        await node.stop(instance.id)


async def test_vm_that_dies_while_it_is_snapshotted_leaves_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own command cleans up after it, not only the next one."""
    instance = await node.restore("hello")
    adopt = node.instances.adopt

    async def adopt_and_kill(row: object) -> object:
        adopted = await adopt(row)  # type: ignore[arg-type]
        assert adopted.vmm.process is not None
        adopted.vmm.process.kill()
        return adopted

    monkeypatch.setattr(node.instances, "adopt", adopt_and_kill)
    with pytest.raises(Exception, match="ended"):
        await node.create_snapshot(instance.id, name="never")
    assert node.parts.journal.instances() == []
    assert find_leftovers(node.parts.settings) == []
    assert json.loads((await node.invoke("hello", Request())).response.body)


def spoil(node: Node, name: str) -> None:
    """Make a snapshot's memory shorter than its manifest says."""
    ref = node.parts.journal.ref(name)
    assert ref is not None
    memory = node.parts.snapshots.root / ref.digest / "memory"
    memory.chmod(0o600)
    os.truncate(memory, 4096)


async def test_damaged_function_is_deployed_again_or_deleted(node: Node) -> None:
    """A damaged snapshot is refused, stays in nobody's way, and goes with its name."""
    before = kept_files(node)
    await node.deploy(EXAMPLES / "hello", name="spoilt")
    spoil(node, "spoilt")
    with pytest.raises(Damaged, match="memory"):
        await node.invoke("spoilt", Request())
    await node.deploy(EXAMPLES / "hello", name="spoilt")
    assert (await node.invoke("spoilt", Request())).response.status == 200
    spoil(node, "spoilt")
    await node.remove_function("spoilt")
    assert kept_files(node) == before
    assert {path.name for path in node.parts.snapshots.root.iterdir()} <= before


async def test_damaged_snapshot_is_deleted(node: Node) -> None:
    """`snapshot rm` deletes what cannot be read any more."""
    async with running(node, "hello") as instance:
        captured = await node.create_snapshot(instance.id, name="aside")
    spoil(node, "aside")
    assert await node.remove_snapshot("aside") == captured.snapshot.digest
    assert node.parts.journal.ref("aside") is None
    assert not captured.snapshot.directory.exists()
    assert captured.snapshot.disk_usage_bytes() == 0  # for who listed it before


async def test_new_snapshot_under_an_old_name_takes_its_place(node: Node) -> None:
    """What had the name before is deleted."""
    async with running(node, "hello") as instance:
        first = await node.create_snapshot(instance.id, name="aside")
        await node.create_snapshot(instance.id, name="aside")
    assert not first.snapshot.directory.exists()
    await node.remove_snapshot("aside")


async def test_several_instances_are_stopped_or_none(node: Node) -> None:
    """A wrong id among right ones stops nothing; one that is named twice counts once."""
    instance = await node.restore("hello")
    with pytest.raises(NotFound):
        await node.stop_all([instance.id, "nobody"])
    assert [row.id for row in node.parts.journal.instances()] == [instance.id]
    assert await node.stop_all([instance.id, instance.id[:9]]) == [instance.id]


async def test_invocations_beside_a_stop(node: Node) -> None:
    """One that an instance has is answered before that ends; the next ones ask another instance."""
    first, second = await node.restore("hello"), await node.restore("hello")
    vmm = first.vmm.process
    assert vmm is not None
    vmm.signal(signal.SIGSTOP)
    asking = asyncio.ensure_future(node.invoke("hello", Request()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asking), 0.3)
    stopping = asyncio.ensure_future(node.stop(first.id))
    await wait_for(lambda: node.parts.journal.instance(first.id).state == "stopping")
    other = await node.invoke("hello", Request())
    assert (other.instance_id, other.response.status) == (second.id, 200)
    vmm.signal(signal.SIGCONT)
    answered = await asking
    assert (answered.instance_id, answered.response.status) == (first.id, 200)
    assert await stopping == first.id
    await node.stop(second.id)
