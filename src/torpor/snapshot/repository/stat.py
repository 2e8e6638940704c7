"""How much a repository holds, what it would be without sharing, and who needs what of it."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.snapshot.repository.reachable import mark
from torpor.snapshot.windows import window_length

if TYPE_CHECKING:
    from torpor.snapshot.repository.reachable import Reachable
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stored import StoredSnapshot

_KINDS: Final = ("refs", "snapshots", "images", "packs", "index", "leases", "condemned")


@dataclass(frozen=True)
class RefStat:
    """What one ref needs, in bytes.

    `logical` is the content of its windows before compression, `stored` their sealed chunks;
    `own` of the stored is needed by no other ref, `shared` by others too.
    """

    name: str
    snapshot: str
    function: str
    is_plain: bool
    logical_bytes: int
    stored_bytes: int
    own_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class StoreStat:
    """What a whole repository holds, in bytes.

    `logical` adds up what each ref needs, `unique` counts each content once, `compressed` is that
    as it is stored. `unneeded` is what packs hold beside it: a pack stays as long as one of its
    chunks is needed. `objects` has the bytes in the bucket by kind.
    """

    logical_bytes: int
    unique_bytes: int
    compressed_bytes: int
    unneeded_bytes: int
    objects: dict[str, int]
    refs: tuple[RefStat, ...]


def measure(repository: Repository) -> StoreStat:
    """Measure a repository by its records; no content is read.

    Raises Damaged, ObjectMissing or KeyMissing for a record that cannot be read.
    """
    needed = mark(repository)
    by_ref = {name: _chunks(needed, _snapshot_of(needed, name)) for name in needed.refs}
    users = collections.Counter(chunk for chunks in by_ref.values() for chunk in chunks)
    unique = {chunk: sizes for chunks in by_ref.values() for chunk, sizes in chunks.items()}
    objects = dict.fromkeys(_KINDS, 0)
    for info in repository.store.list(""):
        kind = info.key.split("/", 1)[0]
        objects[kind] = objects.get(kind, 0) + info.size_bytes
    compressed = sum(stored for _, stored in unique.values())
    return StoreStat(
        logical_bytes=sum(_logical(needed, _snapshot_of(needed, name)) for name in needed.refs),
        unique_bytes=sum(raw for raw, _ in unique.values()),
        compressed_bytes=compressed,
        unneeded_bytes=max(0, objects["packs"] - compressed),
        objects=objects,
        refs=tuple(_ref_stat(needed, name, by_ref[name], users) for name in sorted(by_ref)),
    )


_Chunks = dict[tuple[bytes, bytes], tuple[int, int]]


def _ref_stat(
    needed: Reachable, name: str, chunks: _Chunks, users: collections.Counter[tuple[bytes, bytes]]
) -> RefStat:
    snapshot = _snapshot_of(needed, name)
    function = snapshot.manifest.function
    own = sum(stored for chunk, (_, stored) in chunks.items() if users[chunk] == 1)
    stored_bytes = sum(stored for _, stored in chunks.values())
    return RefStat(
        name=name,
        snapshot=snapshot.digest,
        function=function.name if function else "",
        is_plain=snapshot.domain.is_plain,
        logical_bytes=_logical(needed, snapshot),
        stored_bytes=stored_bytes,
        own_bytes=own,
        shared_bytes=stored_bytes - own,
    )


def _snapshot_of(needed: Reachable, name: str) -> StoredSnapshot:
    return needed.snapshots[needed.refs[name].record.manifest.key]


def _chunks(needed: Reachable, snapshot: StoredSnapshot) -> _Chunks:
    """Raw and stored length of each distinct chunk, by domain and id."""
    key_id = snapshot.domain.key_id
    return {
        (key_id, entry.chunk_id): (
            window_length(entry.window, file.size_bytes),
            entry.location.length,
        )
        for file in needed.maps_of(snapshot)
        for entry in file
    }


def _logical(needed: Reachable, snapshot: StoredSnapshot) -> int:
    return sum(
        window_length(entry.window, file.size_bytes)
        for file in needed.maps_of(snapshot)
        for entry in file
    )
