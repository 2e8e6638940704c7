"""What a repository's objects say, checked: refs, snapshots, images, wake headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.snapshot.manifest import outline_of
from torpor.snapshot.repository.records import damaged
from torpor.units import parse_name

if TYPE_CHECKING:
    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import FileMap
    from torpor.snapshot.repository.records import (
        BaseLink,
        ImageLink,
        Link,
        RefRecord,
        SegmentRecord,
        WakeLink,
    )
    from torpor.units import Digest


@dataclass(frozen=True)
class StoredRef:
    """A ref and the tag of the object that it was read from.

    `outline` is what it says of the snapshot's manifest, see `RefRecord`; `sealed` are the bytes of
    its object.
    """

    record: RefRecord
    etag: str
    sealed: bytes
    domain: Domain
    outline: Manifest | None

    def check(self, stored: StoredSnapshot) -> None:
        """Raise Damaged, naming the ref, if its outline is not that of the snapshot's record."""
        if self.outline is None:
            return
        if self.outline != outline_of(stored.manifest) or self.record.images != stored.images:
            raise damaged(ref_key(self.record.name), "its outline is not that of its snapshot")


@dataclass(frozen=True)
class Resolved:
    """What a ref or a digest means; with `ref` it came from one."""

    digest: Digest
    link: Link
    ref: StoredRef | None = None


@dataclass(frozen=True)
class BrokenRef:
    """A ref whose object is damaged, and its tag: who pushes to that name mends it."""

    etag: str


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot's record, checked: its manifest, the maps of memory and disk, its links."""

    digest: Digest
    link: Link
    domain: Domain
    manifest: Manifest
    encoded_manifest: bytes
    memory: FileMap
    disk: FileMap
    wake: WakeLink
    images: tuple[ImageLink, ...]
    base: BaseLink | None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that may have a working set, by its name there."""
        manifest = self.manifest
        names = {manifest.image: "image"}
        if manifest.function is not None:
            names[manifest.function.app] = "app"
        images = {names[i.digest]: i.size_bytes for i in self.images if i.digest in names}
        return {"memory": self.memory.size_bytes, **images}


@dataclass(frozen=True)
class StoredImage:
    """An image's record, checked."""

    digest: Digest
    link: Link
    domain: Domain
    content: FileMap


@dataclass(frozen=True)
class WakeHeader:
    """The header of a wake object: a map for each file in it, offsets within the object.

    The offsets of the working set's segments are as they are stored: from the header's end on.
    """

    link: WakeLink
    domain: Domain
    files: dict[str, FileMap]
    working_set: tuple[SegmentRecord, ...]


def ref_key(name: str) -> str:
    """The object of a ref. Raises InvalidInput."""
    return f"refs/{parse_name(name, what='ref name')}"
