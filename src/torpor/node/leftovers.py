"""What of torpor's is on this host, by torpor's own names: for proofs that nothing was left.

Unlike `reconcile` it removes nothing and looks past the journal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torpor.host.fuse.connection import find_device
from torpor.host.process import find_processes_in
from torpor.net.addresses import is_own_link, is_own_namespace

if TYPE_CHECKING:
    from torpor.config import Settings

_NAMESPACES = Path("/run/netns")
_LINKS = Path("/sys/class/net")


def find_leftovers(settings: Settings) -> list[str]:
    """One line each: processes, directories and mounts of this home, host-wide network parts.

    A pager that stays by its settings is none.

    Blocking. Network namespaces and links belong to all homes of the host together, so on a host
    where another home is at work they are listed too.
    """
    instances = settings.home / "instances"
    found = [f"process {process.pid}" for process in find_processes_in(instances)]
    if instances.is_dir():
        found += [f"directory {path}" for path in sorted(instances.iterdir())]
    if not settings.pager_stays:
        found += _find_pager(settings.home)
    found += [f"trial {path}" for path in sorted((settings.home / "trials").glob("*"))]
    if _NAMESPACES.is_dir():
        found += [
            f"namespace {path.name}"
            for path in sorted(_NAMESPACES.iterdir())
            if is_own_namespace(path.name)
        ]
    found += [f"link {path.name}" for path in sorted(_LINKS.iterdir()) if is_own_link(path.name)]
    staged = (settings.home / "snapshots").glob(".staging-*")
    return found + [f"staged snapshot {path.name}" for path in sorted(staged)]


def _find_pager(home: Path) -> list[str]:
    directory = home.absolute() / "pager"
    found = [f"pager process {process.pid}" for process in find_processes_in(directory)]
    found += [f"pager directory {directory}"] if directory.exists() else []
    mount = directory / "mount"
    return found + ([f"pager mount {mount}"] if find_device(mount) is not None else [])
