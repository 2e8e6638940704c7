"""A running instance becomes two or more, without stopping for longer than a pause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import InvalidInput
from torpor.host.barrier import reach
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from torpor.node.capture import Captured
    from torpor.node.live import Instance
    from torpor.node.node import Node

_MOST_CLONES: Final = 64


@dataclass(frozen=True)
class Forked:
    """What a fork made: the snapshot between, whose pause it was, and the clones."""

    captured: Captured
    clones: list[Instance]


async def fork(node: Node, instance_id: str, *, count: int) -> Forked:
    """Make `count` clones of an instance, which runs on.

    They go on from the same instant, each with its own address, name and entropy. The snapshot
    between has no name and goes after the last clone. The caller holds the files lock. Raises
    NotFound, Conflict, InvalidInput, what `restore` raises; then nothing is left but the instance.
    """
    if not 1 <= count <= _MOST_CLONES:
        raise InvalidInput(f"cannot make {count} clones", hint=f"ask for 1 to {_MOST_CLONES}")
    row = node.parts.journal.instance(instance_id)
    captured = await node.capture_running(row)
    reach("fork captured")
    clones: list[Instance] = []
    try:
        for _ in range(count):
            clones.append(await node.instances.restore(captured.snapshot))
        reach("clones made")
        for clone in clones:
            await node.instances.release(clone)
            reach("clone released")
    except BaseException:
        for clone in clones:
            await finish(node.instances.destroy(clone.id, vmm=clone.vmm))
        raise
    return Forked(captured, clones)
