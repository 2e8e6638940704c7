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
OLDER_MACHINE = "microvm"


async def test_named_model(node: Node) -> None:
    """A guest of a named CPU model boots, sleeps and wakes; only that name is asked of a host.

    The machine that it booted on is none of the type that new VMs have: it wakes on its own.
    """
    settings = replace(node.parts.settings, cpu_model=MODEL)
    named = Node(replace(node.parts, settings=settings, driver=QemuDriver(settings)))
    older_driver = QemuDriver(settings)
    older_driver.machine_type = OLDER_MACHINE
    older = Node(replace(named.parts, driver=older_driver))
    spec = load_spec(EXAMPLES / "ledger")
    booted = await older.start_cold(spec, Timeline())
    try:
        await ask(booted, "POST", body={"amount": 5, "note": "named"})
        captured = await capture(
            older.parts, booted, kind="instance", function=booted.function, then="resume"
        )
    finally:
        await older.stop_instance(booted)
    snapshot = captured.snapshot
    node.parts.journal.set_ref("named", snapshot.digest)
    platform = snapshot.manifest.platform
    assert (platform.cpu_model, platform.cpu_flags, platform.cpuid) == (MODEL, (), ())
    assert platform.machine_type == OLDER_MACHINE
    assert named.parts.driver_of(snapshot.manifest).platform(platform.kernel) == platform
    async with running(named, snapshot.digest) as woken:
        assert (await ask(woken))["sum"] == 5
    with pytest.raises(Incompatible, match=f"cpu model is {MODEL} in the snapshot, max on this"):
        await node.restore(snapshot.digest)
    await node.remove_snapshot("named")
