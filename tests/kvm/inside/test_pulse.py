"""What keeps level 1 alive; runs there only."""

from __future__ import annotations

import time
from pathlib import Path


def test_pulse_brings_interrupts() -> None:
    """Beats from outside are interrupts here, also while nothing else happens."""
    wanted, until_s = count_interrupts("virtqueues") + 3, time.monotonic() + 20
    while count_interrupts("virtqueues") < wanted:
        assert time.monotonic() < until_s
        time.sleep(0.1)


def count_interrupts(device: str) -> int:
    """How many came so far of devices whose name ends so (/proc/interrupts, one processor)."""
    lines = Path("/proc/interrupts").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.endswith(device))
