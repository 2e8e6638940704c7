"""What on a node's disk nothing needs any more: snapshots without a name, apps without a snapshot.

An interrupted deploy leaves such things, a new revision makes the old one such a thing. Images are
not among them: they are built on purpose, or fetched with a snapshot, and `image rm` deletes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torpor.errors import Conflict, Incompatible
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.node.parts import log
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Set
    from pathlib import Path

    from torpor.node.parts import Parts
    from torpor.snapshot.local import LocalSnapshot


@dataclass(frozen=True)
class Unneeded:
    """A snapshot or app that nothing needs, and the bytes that it occupies.

    A "damaged" one is a snapshot of which nothing can be told any more.
    """

    digest: Digest
    kind: Literal["base", "function", "instance", "app", "damaged"]
    size_bytes: int


async def collect(parts: Parts) -> list[Unneeded] | None:
    """Delete what nothing needs; what was deleted, None if others use snapshots just now."""
    try:
        async with entered_in_thread(parts.files_lock(wait_s=0)):
            if not await in_thread(find_unneeded, parts):
                return []
        async with entered_in_thread(parts.files_lock(alone=True, wait_s=0)):
            return await in_thread(delete_unneeded, parts)
    except Conflict:
        return None
    except Incompatible as error:  # a newer torpor's snapshots are here: it will collect
        log.warning("nothing was collected error=%s", error)
        return []


def find_unneeded(parts: Parts, *, bases: bool = False) -> list[Unneeded]:
    """What no name, base or instance needs; with `bases` also bases of which nothing descends.

    Apps of the snapshots that are in it are in it too. Blocking. The caller holds the files lock:
    what is deleted meanwhile cannot be looked at.
    """
    snapshots = parts.snapshots.list()
    named = {str(ref.digest) for ref in parts.journal.refs()}
    named |= {row.snapshot for row in parts.journal.instances()}
    known_bases = {*parts.journal.bases().values()}
    kept = [snapshot for snapshot in snapshots if snapshot.digest in named]
    here = {snapshot.digest: snapshot for snapshot in snapshots}
    for digest in known_bases - named:
        base = here.get(digest)
        if base is not None and not (bases and _is_unused(base, kept, here)):
            kept.append(base)
    keep = {snapshot.digest for snapshot in kept}
    unneeded = [
        Unneeded(snapshot.digest, snapshot.manifest.kind, snapshot.disk_usage_bytes())
        for snapshot in snapshots
        if snapshot.digest not in keep
    ]
    unread = {path.name for path in parts.snapshots.root.glob("[!.]*")} - here.keys()
    unneeded += [
        Unneeded(Digest(name), "damaged", _disk_usage_bytes(parts.snapshots.root / name))
        for name in sorted(unread - named - known_bases)
    ]
    return [*unneeded, *_find_apps(parts, kept, unread & named)]


def delete_unneeded(parts: Parts, *, bases: bool = False) -> list[Unneeded]:
    """Delete it; what was deleted. Blocking.

    The caller holds the files lock alone: what others are just making is not needed by anything.
    """
    unneeded = find_unneeded(parts, bases=bases)
    for item in unneeded:
        if item.kind == "app":
            parts.images.remove(item.digest)
        else:
            parts.journal.drop_base(item.digest)
            parts.snapshots.remove(item.digest)
    return unneeded


def _disk_usage_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def _find_apps(parts: Parts, kept: list[LocalSnapshot], unread: Set[str]) -> list[Unneeded]:
    if (parts.settings.home / "images").is_symlink() or unread:
        return []  # needed, perhaps, by what is not seen from here
    needed = {snapshot.manifest.function.app for snapshot in kept if snapshot.manifest.function}
    return [
        Unneeded(info.digest, "app", parts.images.path(info.digest).stat().st_blocks * 512)
        for info in parts.images.list()
        if info.kind == "app" and info.digest not in needed
    ]


def _is_unused(
    base: LocalSnapshot, kept: list[LocalSnapshot], here: dict[Digest, LocalSnapshot]
) -> bool:
    """Whether no kept snapshot descends from a base.

    Where a line leads to a snapshot that is not here any more, every base of its image counts.
    """
    for snapshot in kept:
        first = snapshot
        while first.manifest.parent in here:
            first = here[first.manifest.parent]
        is_broken = first.manifest.parent is not None
        if first.digest == base.digest or (
            is_broken and first.manifest.image == base.manifest.image
        ):
            return False
    return True
