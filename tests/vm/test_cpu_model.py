"""Guests of a named CPU model, which all nodes show that can."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fixtures.nodes import EXAMPLES, ask, running
from torpor.errors import Incompatible
from torpor.image.spec import load_spec
from torpor.node.capture import capture
from torpor.node.node import Node
from torpor.node.timeline import Timeline
from torpor.vmm.qemu.driver import QemuDriver

pytestmark = pytest.mark.vm

MODEL = "Nehalem-v1"


async def test_named_model(node: Node) -> None:
    """A guest of a named CPU model boots, sleeps and wakes; only that name is asked of a host."""
    settings = replace(node.parts.settings, cpu_model=MODEL)
    named = Node(replace(node.parts, settings=settings, driver=QemuDriver(settings)))
    spec = load_spec(EXAMPLES / "ledger")
    booted = await named.start_cold(spec, Timeline())
    try:
        await ask(booted, "POST", body={"amount": 5, "note": "named"})
        captured = await capture(
            named.parts, booted, kind="instance", function=booted.function, then="resume"
        )
    finally:
        await named.stop_instance(booted)
    snapshot = captured.snapshot
    node.parts.journal.set_ref("named", snapshot.digest)
    platform = snapshot.manifest.platform
    assert (platform.cpu_model, platform.cpu_flags, platform.cpuid) == (MODEL, (), ())
    async with running(named, snapshot.digest) as woken:
        assert (await ask(woken))["sum"] == 5
    with pytest.raises(Incompatible, match=f"cpu model is {MODEL} in the snapshot, max on this"):
        await node.restore(snapshot.digest)
    await node.remove_snapshot("named")
