"""The rate of this host's time-stamp counter.

Linux does not tell it to programs. QEMU's TCG shows the host's counter to its guests, and a guest
that has to calibrate it against an emulated timer fails at that when the host is busy; the host can
measure it well at any time.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_COUNTER = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret (Intel SDM volume 2)."""

_MEASURE_S = 0.05


@functools.cache
def measure_tsc_khz() -> int | None:
    """The counter's rate in kHz, to about 10 parts in a million; None where there is none.

    Takes 50 ms the first time.
    """
    if platform.machine() != "x86_64":
        return None
    access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    with mmap.mmap(-1, mmap.PAGESIZE, prot=access) as page:
        page.write(_READ_COUNTER)
        code = ctypes.c_char.from_buffer(page)
        read_counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        first_ns, first = _sample(read_counter)
        time.sleep(_MEASURE_S)
        last_ns, last = _sample(read_counter)
        del read_counter, code
    return round((last - first) * 1_000_000 / (last_ns - first_ns))


def _sample(read_counter: Callable[[], int]) -> tuple[int, int]:
    """Clock and counter of one instant: the closest pair of several."""
    pairs = []
    for _ in range(8):
        before_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = read_counter()
        after_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        pairs.append((after_ns - before_ns, (before_ns + after_ns) // 2, counter))
    _, at_ns, counter = min(pairs)
    return at_ns, counter
