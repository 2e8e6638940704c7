"""Snapshots between a node and its store, by either way of transfer."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from torpor.errors import InvalidInput, NotFound
from torpor.node.keyring import open_keyring
from torpor.snapshot import whole
from torpor.snapshot.repository.pulling import Here, pull
from torpor.snapshot.repository.pushing import PushOptions, push
from torpor.snapshot.repository.repository import Repository
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from torpor.node.parts import Parts
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.transfer import TransferReport
    from torpor.units import Digest


class Exchange:
    """Push and pull of one node. Blocking; any thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def repository(self) -> Repository:
        """The repository of this node's store. Raises InvalidInput without a key for it."""
        settings = self._parts.settings
        return Repository(open_store(settings), open_keyring(settings, self._parts.reporter))

    def push(self, snapshot: LocalSnapshot, name: str) -> TransferReport:
        """Send a snapshot and point `name` to it. Raises Conflict, StoreError, InvalidInput."""
        manifest = snapshot.manifest
        digests = [manifest.image, *([manifest.function.app] if manifest.function else [])]
        images = {digest: self._parts.images.path(digest) for digest in digests}
        settings, progress = self._parts.settings, self._parts.reporter
        match settings.transfer:
            case "whole":
                store = open_store(settings)
                return whole.push(store, snapshot, ref=name, images=images, progress=progress)
            case "repository":
                return push(
                    self.repository(),
                    snapshot,
                    ref=name,
                    images=images,
                    base=self._base_of(snapshot),
                    progress=progress,
                    options=PushOptions(level=settings.zstd_level),
                )
            case other:
                assert_never(other)

    def pull(
        self, reference: str, *, expect: Digest | None = None
    ) -> tuple[Digest, Manifest, TransferReport]:
        """Fetch a snapshot by ref or digest; with `expect`, only that one.

        Raises NotFound, Conflict, Damaged, KeyMissing, Incompatible, StoreError, NoSpace.
        """
        settings, parts = self._parts.settings, self._parts
        match settings.transfer:
            case "whole":
                if expect is not None:
                    raise InvalidInput("whole files are pulled without an expected digest")
                return whole.pull(
                    open_store(settings),
                    reference,
                    snapshots=parts.snapshots,
                    adopt_image=parts.images.adopt,
                    has_image=parts.images.has,
                    progress=parts.reporter,
                )
            case "repository":
                here = Here(parts.snapshots, parts.images.has, parts.images.adopt)
                return pull(
                    self.repository(), reference, here=here, progress=parts.reporter, expect=expect
                )
            case other:
                assert_never(other)

    def _base_of(self, snapshot: LocalSnapshot) -> LocalSnapshot | None:
        """The base that a snapshot descends from, as far as this node has the line."""
        current = snapshot
        while current.manifest.kind != "base":
            if current.manifest.parent is None:
                return None
            try:
                current = self._parts.snapshots.get(current.manifest.parent)
            except NotFound:
                return None
        return current
