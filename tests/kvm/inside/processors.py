"""A function that falls asleep on one processor and wakes on another: `sleep`, then `wake`.

Not a test by itself: level 1 has one processor, so `kvm/test_processors.py` runs this in two. Each
node has what is in the directory that the second argument names, and nothing else of the other.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fixtures.nodes import EXAMPLES, SESSION_HOME, ask, running
from torpor.config import Settings, load_settings
from torpor.errors import Incompatible
from torpor.image.spec import load_spec
from torpor.node.capture import capture
from torpor.node.node import Node
from torpor.node.timeline import Timeline
from torpor.snapshot.repository.keys import new_key_line

MODELS = {"host": "", "named": "qemu64,-cx16"}


def settings_of(name: str, directory: Path) -> Settings:
    """A node's, whose guests get the CPU model of that name."""
    home = Path("/rig/tmp") / name
    home.mkdir(parents=True)
    (home / "images").symlink_to(SESSION_HOME / "images")
    given = {"home": str(home), "store": f"file://{directory / 'store'}", "vmm": "qemu"}
    given |= {"key_file": str(directory / "key"), "cpu_model": MODELS[name]}
    return load_settings({**given, "boot_timeout_s": "180s"}, environ={})  # level 1 is slow


async def sleep(directory: Path) -> None:
    """Boot ledger once with each model, add a row, push the snapshot."""
    (directory / "key").write_text(new_key_line() + "\n")
    (directory / "key").chmod(0o600)
    for name in MODELS:
        async with Node.open(settings_of(name, directory)) as node:
            instance = await node.start_cold(load_spec(EXAMPLES / "ledger"), Timeline())
            await ask(instance, "POST", body={"amount": 5, "note": "elsewhere"})
            captured = await capture(
                node.parts, instance, kind="instance", function=instance.function, then="resume"
            )
            node.parts.journal.set_ref(name, captured.snapshot.digest)
            await node.push(name)
            await node.stop_instance(instance)


async def wake(directory: Path) -> None:
    """The one of the named model goes on; the other one is refused with what is missing here."""
    async with Node.open(settings_of("named", directory)) as node, running(node, "named") as woken:
        added = await ask(woken, "POST", body={"amount": 6, "note": "here"})
        seen = await ask(woken)
        assert (added["number"], seen["sum"], seen["integrity"]) == (2, 11, "ok")
    async with Node.open(settings_of("host", directory)) as node:
        try:
            await node.restore("host")
        except Incompatible as error:
            print(error)  # noqa: T201
        else:
            raise AssertionError("a snapshot of more than this processor has was woken")


if __name__ == "__main__":
    asyncio.run({"sleep": sleep, "wake": wake}[sys.argv[1]](Path(sys.argv[2])))
