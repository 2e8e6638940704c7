"""What on a node's disk nothing needs any more: snapshots without a name, apps without a snapshot.

An interrupted deploy leaves such things, a new revision makes the old one such a thing. Images are
not among them: they are built on purpose, or fetched with a snapshot, and `image rm` deletes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.node.parts import Parts
    from torpor.units import Digest


def find_unneeded(parts: Parts) -> dict[Digest, Callable[[str], None]]:
    """Digests of what no name, base, instance or snapshot needs -> what deletes it. Blocking."""
    snapshots = parts.snapshots.list()
    kept = {str(ref.digest) for ref in parts.journal.refs()} | {*parts.journal.bases().values()}
    kept |= {row.snapshot for row in parts.journal.instances()}
    unneeded: dict[Digest, Callable[[str], None]] = {
        snapshot.digest: parts.snapshots.remove
        for snapshot in snapshots
        if snapshot.digest not in kept
    }
    if (parts.settings.home / "images").is_symlink():
        return unneeded  # another home's, whose snapshots are not seen from here
    apps = {snapshot.manifest.function.app for snapshot in snapshots if snapshot.manifest.function}
    for info in parts.images.list():
        if info.kind == "app" and info.digest not in apps:
            unneeded[info.digest] = parts.images.remove
    return unneeded


def delete_unneeded(parts: Parts) -> list[Digest]:
    """Delete it, and what nothing needs after that; the digests of all. Blocking.

    The caller holds the files lock alone: what others are just making is not needed by anything.
    """
    deleted: list[Digest] = []
    while unneeded := find_unneeded(parts):
        for digest, delete in unneeded.items():
            delete(digest)
        deleted += unneeded
    return deleted
