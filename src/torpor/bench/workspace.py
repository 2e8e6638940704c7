"""Where a benchmark keeps what it makes: a directory and namespaces that bear its process's name.

HOME/bench/<pid>-<start ticks>/            files
/run/netns/torpor-bench-<pid>-<start ticks>-<part>
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.config import Settings
from torpor.errors import NoSpace
from torpor.host.netns import remove_namespace
from torpor.host.process import ProcessId
from torpor.net.addresses import BENCH_NAMESPACE_PREFIX, NETNS_DIR
from torpor.pager.client import PagerClient
from torpor.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """A directory of one benchmark, and the name that its namespaces begin with."""

    directory: Path
    namespace_prefix: str

    def require(self, size_bytes: int) -> None:
        """Raise NoSpace unless so much is free."""
        free = shutil.disk_usage(self.directory).free
        if free < size_bytes:
            raise NoSpace(
                f"the benchmark needs {format_size(size_bytes)}, {format_size(free)} are free",
                hint="name another --home, or a smaller --memory",
            )


@contextlib.contextmanager
def workspace(home: Path) -> Iterator[Workspace]:
    """A fresh workspace below a home, its directory gone after the body.

    What benchmarks left that were killed is removed first, pagers of nodes in it too. Namespaces
    are their makers' to remove.
    """
    root = home / "bench"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(root)
    me = ProcessId.of(os.getpid())
    name = f"{me.pid}-{me.start_ticks}"
    directory = root / name
    directory.mkdir(mode=0o700)
    try:
        yield Workspace(directory, f"{BENCH_NAMESPACE_PREFIX}{name}-")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sweep(root: Path) -> None:
    for path in root.iterdir():
        if _is_dead(path.name):
            for pager in path.glob("*/pager"):
                PagerClient(Settings(home=pager.parent)).stop()
            shutil.rmtree(path, ignore_errors=True)
    if NETNS_DIR.is_dir():
        for path in NETNS_DIR.glob(f"{BENCH_NAMESPACE_PREFIX}*"):
            if _is_dead(path.name.removeprefix(BENCH_NAMESPACE_PREFIX)):
                remove_namespace(path)


def _is_dead(name: str) -> bool:
    """Whether a name begins with the identity of a process that has ended."""
    numbers = name.split("-")[:2]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return False
    return not ProcessId(*map(int, numbers)).is_alive()
