"""A node under real KVM; runs in level 1 only, where ledger alone is deployed."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.failing_vmm import failing
from fixtures.nodes import ask, running
from torpor.errors import VmmFailed
from torpor.host import cpu
from torpor.node.leftovers import find_leftovers
from torpor.node.node import Node
from torpor.node.parts import choose_driver
from torpor.pager.keeper import Places

if TYPE_CHECKING:
    from torpor.config import Settings

pytestmark = pytest.mark.vm

CLONES = 3
SSE2 = 26


async def test_kvm_is_chosen(node: Node) -> None:
    """Where KVM runs guests it is taken without being asked for, and snapshots say so."""
    assert cpu.choose_accelerator("auto") == "kvm"
    platform = (await node.inspect("ledger")).snapshot.manifest.platform
    assert platform.accelerator == "kvm"
    assert platform.cpu_vendor == cpu.vendor()
    assert set(platform.cpu_flags) == cpu.flags()
    assert dict(platform.cpuid)["1.0.edx"] >> SSE2 & 1


async def test_clones_differ(node: Node) -> None:
    """Clones of one snapshot have addresses and ids of their own, and each its own database."""
    clones = await asyncio.gather(*(node.restore("ledger") for _ in range(CLONES)))
    try:
        for number, clone in enumerate(clones):
            for _ in range(number):
                await ask(clone, "POST", body={"amount": 1, "note": "own"})
        seen = [await ask(clone) for clone in clones]
    finally:
        await asyncio.gather(*(node.stop_instance(clone) for clone in clones))
    assert [answer["count"] for answer in seen] == list(range(CLONES))
    assert len({clone.address for clone in clones}) == CLONES
    assert len({clone.id for clone in clones}) == CLONES


@pytest.mark.minio
async def test_pager_killed_under_a_guest_out_of_minio(
    node: Node, fresh_settings: Settings, minio_settings: Settings
) -> None:
    """Woken remote-cold out of MinIO, a guest whose pager is killed in between answers on."""
    parts = replace(node.parts, settings=replace(minio_settings, home=node.parts.settings.home))
    await Node(parts).push("ledger")
    settings = replace(
        node.parts.settings,
        home=fresh_settings.home,
        lazy=True,
        key=minio_settings.key,
        store=minio_settings.store,
        s3_endpoint=minio_settings.s3_endpoint,
        s3_access_key_id=minio_settings.s3_access_key_id,
        s3_secret_access_key=minio_settings.s3_secret_access_key,
    )
    async with Node.open(settings) as other, running(other, "ledger") as instance:
        places = Places(settings.home.resolve())
        before = places.identity("pager")
        assert before is not None
        before.signal(signal.SIGKILL)
        added = await ask(instance, "POST", body={"amount": 7, "note": "killed"})
        assert before.wait(timeout_s=60)
        seen = await ask(instance)
    assert (added["number"], seen["sum"], seen["integrity"]) == (1, 7, "ok")


async def test_vmm_killed_at_each_step(node: Node) -> None:
    """A VMM that is killed at any step of a wake or a snapshot: VmmFailed, and nothing is left."""
    settings = node.parts.settings

    def dying(step: str) -> Node:
        driver = failing(choose_driver(settings), step=step, kill=True)
        return Node(replace(node.parts, driver=driver))

    for step in ("start", "load", "resume"):
        with pytest.raises(VmmFailed):
            await dying(step).restore("ledger")
        assert find_leftovers(settings) == [], step
    for step in ("pause", "save_state", "copy_written_memory"):
        instance = await node.restore("ledger")
        with pytest.raises(VmmFailed):
            await dying(step).create_snapshot(instance.id, name="never")
        assert find_leftovers(settings) == [], step
        assert node.parts.journal.ref("never") is None
