"""What the refs of a repository need: the mark of mark and sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torpor.errors import DataError, ObjectMissing, TorporError
from torpor.host.cancel import checkpoint
from torpor.snapshot.repository.repository import index_key, pack_key
from torpor.snapshot.repository.stored import ref_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torpor.snapshot.repository.filemap import FileMap
    from torpor.snapshot.repository.records import Link
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stored import StoredImage, StoredRef, StoredSnapshot
    from torpor.units import Digest


@dataclass
class Reachable:
    """All that some refs need: records by object name, the packs, and every object's name."""

    refs: dict[str, StoredRef] = field(default_factory=dict)
    snapshots: dict[str, StoredSnapshot] = field(default_factory=dict)
    images: dict[str, StoredImage] = field(default_factory=dict)
    packs: set[bytes] = field(default_factory=set)

    def keys(self) -> set[str]:
        """The names of all objects that must stay, an index for each pack among them."""
        return {
            *(ref_key(name) for name in self.refs),
            *self.snapshots,
            *(snapshot.wake.key for snapshot in self.snapshots.values()),
            *self.images,
            *(pack_key(pack) for pack in self.packs),
            *(index_key(pack) for pack in self.packs),
        }

    def maps_of(self, snapshot: StoredSnapshot) -> Iterator[FileMap]:
        """The maps of a snapshot's memory, disk and images."""
        yield from (snapshot.memory, snapshot.disk)
        for image in snapshot.images:
            if image.record.key in self.images:
                yield self.images[image.record.key].content


def mark(
    repository: Repository,
    *,
    refs: Sequence[str] | None = None,
    problem: Callable[[str, TorporError], None] | None = None,
) -> Reachable:
    """All that `refs` (default: every ref) need. Reads each record once.

    What cannot be read raises Damaged, ObjectMissing, KeyMissing or Incompatible naming it; with
    `problem`, that is told the object's name and the error instead, and marking goes on.
    """
    marker = _Marker(repository, problem)
    for name in repository.refs() if refs is None else refs:
        checkpoint()
        marker.ref(name)
    return marker.found


class _Marker:
    def __init__(
        self, repository: Repository, problem: Callable[[str, TorporError], None] | None
    ) -> None:
        self._repository = repository
        self._problem = problem
        self._failed: set[str] = set()
        self.found = Reachable()

    def ref(self, name: str) -> None:
        try:
            ref = self._repository.read_ref(name)
        except (DataError, ObjectMissing) as error:
            self._tell(ref_key(name), error)
            return
        if ref is not None:  # else it was deleted meanwhile
            self.found.refs[name] = ref
            self._snapshot(ref.record.snapshot, ref.record.manifest)

    def _snapshot(self, digest: Digest, link: Link) -> None:
        if link.key in self.found.snapshots or link.key in self._failed:
            return
        try:
            snapshot = self._repository.read_snapshot(digest, link)
        except (DataError, ObjectMissing) as error:
            self._tell(link.key, error)
            return
        self.found.snapshots[link.key] = snapshot
        self._packs(snapshot.memory, snapshot.disk)
        for image in snapshot.images:
            key = image.record.key
            if key in self.found.images or key in self._failed:
                continue
            try:
                stored = self.found.images[key] = self._repository.read_image(image)
            except (DataError, ObjectMissing) as error:
                self._tell(key, error)
                continue
            self._packs(stored.content)
        if snapshot.base is not None:
            self._snapshot(snapshot.base.digest, snapshot.base.manifest)

    def _packs(self, *maps: FileMap) -> None:
        for file in maps:
            self.found.packs |= file.packs()

    def _tell(self, key: str, error: TorporError) -> None:
        self._failed.add(key)
        if self._problem is None:
            raise error
        self._problem(key, error)
