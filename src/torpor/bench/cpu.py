"""CPU seconds of a node's processes: this one, those it started, its VMMs, its pager."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.pager.keeper import Places

if TYPE_CHECKING:
    from torpor.node.node import Node

_TICKS: Final = os.sysconf("SC_CLK_TCK")


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all its threads (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def node_cpu_s(node: Node) -> float:
    """CPU seconds so far of all that works for a node. Blocking.

    This process, its children that have ended, the VMMs that run, keeper and pager.
    """
    times = os.times()
    places = Places(node.parts.settings.home.resolve())
    identities = [places.identity(who) for who in ("keeper", "pager")]
    identities += [row.vmm for row in node.parts.journal.instances()]
    others_s = sum(process_cpu_s(each.pid) for each in identities if each is not None)
    return time.process_time() + times.children_user + times.children_system + others_s
