"""Wakes out of the bucket: the guest runs while its memory still arrives."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.commands import TORPOR
from fixtures.nodes import ask, running
from torpor.host.cancel import in_thread
from torpor.node.invoke import Request
from torpor.node.node import Node
from torpor.pager.client import PagerClient

if TYPE_CHECKING:
    from torpor.config import Settings
    from torpor.pager.client import Served
    from torpor.snapshot.local import LocalSnapshot

pytestmark = pytest.mark.vm


@pytest.fixture
def lazy_settings(fresh_settings: Settings) -> Settings:
    """Settings of a node that has nothing but the store, and wakes lazily: that is the default."""
    assert fresh_settings.lazy
    return fresh_settings


async def test_wakes_from_the_store(node: Node, lazy_settings: Settings) -> None:
    """A function answers on a node that has nothing of it, and leaves no pager behind."""
    await node.push("hello")
    async with Node.open(lazy_settings) as other:
        async with running(other, "hello") as instance:
            answer = await ask(instance)
            counters = other.paging.client.counters()
            (opened,) = counters["snapshots"].values()
        assert answer["instance"] == instance.id
        assert opened["push"]["windows"] > 0
        assert opened["push"]["failure"] == ""
    assert not (lazy_settings.home / "pager").exists()


async def test_remote_mode_reads_a_ref_once(
    node: Node, lazy_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the node has read of a ref is what its pager opens: that is given it with the name."""
    await node.push("hello")
    given = []

    def begin(client: PagerClient, *arguments: Any, **more: Any) -> Served:  # noqa: ANN401
        given.append(more["ref"])
        return begin_it(client, *arguments, **more)

    begin_it = PagerClient.begin
    monkeypatch.setattr(PagerClient, "begin", begin)
    async with Node.open(replace(lazy_settings, snapshots="remote")) as other:
        ref = await in_thread(other.exchange.repository().read_ref, "hello")
        async with running(other, "hello") as instance:
            assert (await ask(instance))["instance"] == instance.id
    assert ref is not None
    assert given == [ref.sealed]


async def test_deploy_records_a_working_set(node: Node) -> None:
    """What a deploy's trials touched is kept beside the snapshot, in order."""
    touched = {
        part.file: part.windows for part in (await node.inspect("hello")).snapshot.working_set()
    }
    assert len(touched["memory"]) > 100
    assert len(set(touched["memory"])) == len(touched["memory"])
    assert list(touched["memory"]) != sorted(touched["memory"])


async def test_invoke_wakes_lazily_twice(node: Node, lazy_settings: Settings) -> None:
    """A second wake on the node needs no second fetch of the working set."""
    await node.push("hello")
    async with Node.open(lazy_settings) as other:
        first = await other.invoke("hello", Request())
        second = await other.invoke("hello", Request())
    assert first.response.status == second.response.status == 200
    assert not (lazy_settings.home / "pager").exists()


async def test_trace_of_a_wake(node: Node, lazy_settings: Settings) -> None:
    """A trace has the opening's parts inside it, the push, and each window by where it was."""
    await node.push("hello")
    async with Node.open(lazy_settings) as other:
        instance = await other.restore("hello", trace=True)
        trace = instance.trace
        await other.stop_instance(instance)
        invoked = await other.invoke("hello", Request(), trace=True)
    assert trace is not None
    assert trace.paged is not None
    steps = {step.name: step for step in trace.steps}
    assert {"open", "slot", "scratch", "vmm start", "load", "resume", "wake"} < steps.keys()
    begun, completed = (step for step in trace.steps if step.name == "open")
    for name in ("pager start", "resolve"):
        assert begun.begin_s <= steps[name].begin_s <= begun.begin_s + begun.duration_s
    for name in ("manifest", "wake object", "publish"):
        part = steps[name]
        assert part.part_of == "open"
        assert begun.begin_s <= part.begin_s
        assert part.begin_s + part.duration_s <= completed.begin_s + completed.duration_s
    assert begun.begin_s < steps["vmm start"].begin_s < completed.begin_s
    assert steps["push"].ended
    assert steps["first window"].duration_s <= steps["push"].duration_s
    assert steps["wake"].begin_s + steps["wake"].duration_s <= trace.ready_s
    assert trace.paged.classes["pushed"].windows > 100
    assert trace.paged.requests >= 4  # the ref, manifest, wake object, and what it holds
    assert trace.paged.fetched_bytes > 1 << 20
    assert invoked.trace is not None
    assert "request" in {step.name for step in invoked.trace.steps}


async def test_trial_of_an_instance(node: Node) -> None:
    """A snapshot's working set is its parent's, with a trial its own; both wake and trace."""
    function = (await node.inspect("ledger")).snapshot
    async with running(node, "ledger") as instance:
        await ask(instance, "POST", body={"amount": 5})
        plain = await node.create_snapshot(instance.id, name="without-trial")
        tried = await node.create_snapshot(instance.id, name="with-trial", trial=True)
    touched = {part.file: part.windows for part in tried.snapshot.working_set()}
    assert len(touched["memory"]) > 100
    assert plain.snapshot.working_set() == function.working_set() != tried.snapshot.working_set()
    woken = await node.restore("with-trial", trace=True)
    try:
        assert (await ask(woken))["count"] == 1  # the trials' clones changed nothing of it
        assert woken.trace is not None
        assert woken.trace.paged is None
        assert {step.name for step in woken.trace.steps} >= {"slot", "vmm start", "wake"}
    finally:
        await node.stop_instance(woken)
        for name in ("with-trial", "without-trial"):
            await node.remove_snapshot(name)


async def test_snapshot_of_a_lazy_instance(node: Node, lazy_settings: Settings) -> None:
    """A snapshot of a lazily woken instance wakes here without a pager, and travels on.

    It has the working set of the function, which came with that.
    """
    await node.push("hello")
    function = (await node.inspect("hello")).snapshot
    async with Node.open(lazy_settings) as other:
        async with running(other, "hello") as instance:
            captured = await other.create_snapshot(instance.id, name="onward")
        assert not (lazy_settings.home / "pager").exists()
        async with running(other, "onward") as again:
            assert (await ask(again))["instance"] == again.id
        assert not (lazy_settings.home / "pager").exists()
        report = await other.push("onward")
    assert by_file(captured.snapshot) == by_file(function)
    assert report.digest == captured.snapshot.digest


def by_file(snapshot: LocalSnapshot) -> dict[str, set[int]]:
    """A working set without its order."""
    return {part.file: set(part.windows) for part in snapshot.working_set()}


async def test_pulled_under_a_running_instance(node: Node, lazy_settings: Settings) -> None:
    """A pull, or a wake with `--no-lazy`, completes what is open lazily, whoever maps it."""
    await node.push("ledger")
    eager_settings = replace(lazy_settings, lazy=False)
    async with Node.open(lazy_settings) as other, running(other, "ledger") as instance:
        await ask(instance, "POST", body={"amount": 5})
        named, _ = await other.pull("ledger")
        assert named.snapshot.served is None
        captured = await other.create_snapshot(instance.id, name="onward")
        assert captured.snapshot.manifest.parent == named.snapshot.digest
    async with (
        Node.open(replace(lazy_settings, store="file:///nowhere")) as alone,
        running(alone, "onward") as again,
        running(alone, "ledger") as first,
    ):
        assert ((await ask(again))["count"], (await ask(first))["count"]) == (1, 0)
    await node.push("hello")
    async with Node.open(lazy_settings) as other, running(other, "hello") as instance:
        assert instance.parent is not None
        assert instance.parent.served is not None
        async with Node.open(eager_settings) as eager, running(eager, "hello") as second:
            assert second.parent is not None
            assert second.parent.served is None
            assert (await ask(second))["instance"] == second.id
        assert (await ask(instance))["instance"] == instance.id


async def test_without_fuse(node: Node, lazy_settings: Settings) -> None:
    """Where nothing can be mounted a snapshot is fetched before it wakes, and that is said."""
    await node.push("hello")
    program = 'mount --bind /dev/null /dev/fuse && exec "$@"'
    command = [TORPOR, "--home", lazy_settings.home, "invoke", "hello"]
    environ = {"TORPOR_STORE": lazy_settings.store, "TORPOR_KEY": lazy_settings.key}
    done = await asyncio.to_thread(
        subprocess.run,
        ["unshare", "--mount", "sh", "-ec", program, "sh", *command],
        capture_output=True,
        text=True,
        env=os.environ | environ,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["instance"].startswith("hello-")
    assert "fetching the snapshot whole first" in done.stderr
    async with Node.open(lazy_settings) as other:
        assert [named.snapshot.served for named in other.snapshots()] == [None]


async def test_lazy_snapshot_is_pushed_on(node: Node, lazy_settings: Settings) -> None:
    """A node sends what it has open itself to the store under another name."""
    await node.push("hello")
    async with Node.open(lazy_settings) as other, running(other, "hello") as instance:
        assert instance.parent is not None
        report = await other.push("hello", name="hello-2")
    assert report.digest == instance.parent.digest
