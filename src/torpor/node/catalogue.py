"""What is on a node: snapshots and their names, images, and what of them nothing needs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.errors import Conflict, DataError, InvalidInput, NotFound
from torpor.node.collect import delete_unneeded, find_unneeded
from torpor.units import parse_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.image.library import ImageInfo
    from torpor.node.collect import Unneeded
    from torpor.node.journal_rows import Ref
    from torpor.node.parts import Parts
    from torpor.snapshot.local import LocalSnapshot, Unreadable
    from torpor.snapshot.manifest import Kind
    from torpor.units import Digest


@dataclass(frozen=True)
class NamedSnapshot:
    """A snapshot on this node and the names that point to it."""

    snapshot: LocalSnapshot
    names: tuple[str, ...]


class Catalogue:
    """The snapshots, names and images of one node. Blocking; any thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def snapshots(self) -> list[NamedSnapshot]:
        """All snapshots on this node that can be read, those without a name too."""
        refs = self._parts.journal.refs()
        return [_named(snapshot, refs) for snapshot in self._parts.snapshots.survey()[0]]

    def unreadable(self) -> list[tuple[Unreadable, tuple[str, ...]]]:
        """The snapshots that cannot be read, of a newer format or damaged, with their names."""
        refs = self._parts.journal.refs()
        unreadable = self._parts.snapshots.survey()[1]
        return [(one, _names(one.digest, refs)) for one in unreadable]

    def find(self, reference: str, *, expect: Digest | None = None) -> LocalSnapshot | None:
        """A snapshot on this node by ref, digest or a digest's beginning, None if it is not here.

        Raises Conflict when it is another than `expect`.
        """
        snapshot = self._find(reference)
        if snapshot is not None and expect is not None and snapshot.digest != expect:
            raise Conflict(
                f"{reference} on this node is snapshot {snapshot.digest[:12]}, not {expect[:12]}",
                hint=f"`torpor snapshot pull {reference} --expect-digest …` fetches that one,"
                " if the store has it",
            )
        return snapshot

    def get(self, reference: str) -> NamedSnapshot:
        """A snapshot on this node, as `find` takes it. Raises NotFound."""
        snapshot = self._find(reference)
        if snapshot is None:
            raise NotFound(
                f"there is no snapshot {reference!r} on this node",
                hint="`torpor snapshot ls` lists them, `torpor snapshot pull` fetches one",
            )
        return _named(snapshot, self._parts.journal.refs())

    def kind(self, digest: Digest) -> Kind | None:
        """What kind of snapshot it is, None if it is not here or cannot be read."""
        try:
            return self._parts.snapshots.get(digest).manifest.kind
        except (NotFound, DataError):
            return None

    def name_to_send(self, named: NamedSnapshot, reference: str, wanted: str | None) -> str:
        """The name under which a snapshot leaves this node.

        That is `wanted`, else `reference` if it is one of its names, else the first of them.
        Raises InvalidInput when there is none, and for a base, which travels with its functions.
        """
        digest = named.snapshot.digest[:12]
        if named.snapshot.manifest.kind == "base":
            raise InvalidInput(
                f"snapshot {digest} is a base and has no function in it",
                hint="push or export a function: its base goes along as far as it needs it",
            )
        if wanted is not None:
            return parse_name(wanted, what="snapshot name")
        if not named.names:
            raise InvalidInput(
                f"snapshot {digest} has no name to go under", hint="give it one with --name"
            )
        return reference if reference in named.names else named.names[0]

    def remove_snapshot(self, reference: str) -> Digest:
        """Delete a snapshot and its names, a damaged one too; its digest.

        Raises NotFound, Conflict for a function's: `rm` is for those.
        """
        journal = self._parts.journal
        with self._parts.files_lock(alone=True):
            ref = journal.ref(reference)
            digest = ref.digest if ref is not None else self.get(reference).snapshot.digest
            names = _names(digest, journal.refs())
            if self.kind(digest) == "function" and names:
                raise Conflict(
                    f"{reference!r} is the snapshot of function {names[0]!r}",
                    hint=f"`torpor rm {names[0]}` deletes the function",
                )
            users = [row.id for row in journal.instances() if row.snapshot == digest]
            if users:
                raise Conflict(
                    f"snapshot {digest[:12]} is in use",
                    reason=f"by instances {', '.join(users)}",
                    hint="stop those first",
                )
            for name in (*names, digest):
                journal.drop_ref(name)
            journal.drop_base(digest)
            with contextlib.suppress(NotFound):  # only its name was left
                self._parts.snapshots.remove(digest)
        return digest

    def remove_image(self, digest: str) -> ImageInfo:
        """Delete an image. Raises Conflict while a snapshot on this node needs it."""
        info = self._parts.images.get(digest)
        with self._parts.files_lock(alone=True):
            users = [s.digest[:12] for s in self._parts.snapshots.list() if _needs(s, info.digest)]
            if users:
                raise Conflict(
                    f"image {info.digest[:12]} is in use",
                    reason=f"by snapshots {', '.join(users)}",
                    hint="remove those first, with `torpor rm` or `torpor snapshot rm`",
                )
            self._parts.images.remove(info.digest)
        return info

    def collect(self, *, bases: bool = False, dry_run: bool = False) -> list[Unneeded]:
        """Delete what nothing needs, or with `dry_run` only find it; see `find_unneeded`.

        Raises Conflict when others use snapshots for long.
        """
        if dry_run:
            with self._parts.files_lock():
                return find_unneeded(self._parts, bases=bases)
        with self._parts.files_lock(alone=True):
            return delete_unneeded(self._parts, bases=bases)

    def _find(self, reference: str) -> LocalSnapshot | None:
        ref = self._parts.journal.ref(reference)
        if ref is not None:
            return self._parts.snapshots.get(ref.digest)
        try:
            return self._parts.snapshots.resolve(reference)
        except (NotFound, InvalidInput):
            return None


def _named(snapshot: LocalSnapshot, refs: Sequence[Ref]) -> NamedSnapshot:
    return NamedSnapshot(snapshot, _names(snapshot.digest, refs))


def _names(digest: Digest, refs: Sequence[Ref]) -> tuple[str, ...]:
    """The ref that keeps a snapshot which was fetched by its digest is not a name."""
    return tuple(ref.name for ref in refs if ref.digest == digest != ref.name)


def _needs(snapshot: LocalSnapshot, image: Digest) -> bool:
    manifest = snapshot.manifest
    return image in (manifest.image, manifest.function.app if manifest.function else None)
