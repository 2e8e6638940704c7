"""What a repository says of one snapshot, and of its refs: for people to look at.

Records are read and verified, content is not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import DataError, ObjectMissing
from torpor.host.threads import map_ordered
from torpor.snapshot.windows import window_length

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import Entry, FileMap
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stored import StoredRef, StoredSnapshot
    from torpor.units import Digest

_PARALLEL: Final = 8


@dataclass(frozen=True)
class Content:
    """One file of a snapshot: its windows that are not zero, as content and as they are stored.

    A chunk that several windows share counts for each. `shared_windows` and `shared_bytes` (as
    stored) are those that the base has too, at any place.
    """

    name: str
    size_bytes: int
    windows: int
    content_bytes: int
    stored_bytes: int
    shared_windows: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True)
class Description:
    """A snapshot in a repository. `key_id` is empty when it is plain: everybody can read it.

    `name` and `updated_ns` are the ref's, if it was asked for by one. `base` is the base that went
    along with it. `wake_bytes` and `record_bytes` are the lengths of the wake object and of the
    snapshot's record.
    """

    digest: Digest
    name: str | None
    updated_ns: int | None
    key_id: str
    manifest: Manifest
    base: Digest | None
    files: tuple[Content, ...]
    wake_bytes: int
    record_bytes: int
    packs: int


@dataclass(frozen=True)
class RefLine:
    """One ref, or why it cannot be read. `key_id` is empty for a plain one."""

    name: str
    snapshot: str
    key_id: str
    updated_ns: int
    problem: str = ""


def describe(repository: Repository, reference: str) -> Description:
    """What is stored of a snapshot, by ref or whole digest.

    Raises NotFound, Damaged, ObjectMissing, KeyMissing, Incompatible, StoreError.
    """
    resolved = repository.resolve(reference)
    digest, ref, stored = resolved.digest, resolved.ref, repository.read_resolved(resolved)
    base = _base_chunks(repository, stored)
    files = [
        _content("memory", stored.memory, base),
        _content("disk", stored.disk, base),
    ]
    packs = stored.memory.packs() | stored.disk.packs()
    for image in stored.images:
        record = repository.read_image(image)
        kind = "image" if image.digest == stored.manifest.image else "app"
        files.append(_content(f"{kind} {image.digest[:12]}", record.content, frozenset()))
        packs |= record.content.packs()
    return Description(
        digest=digest,
        name=ref.record.name if ref else None,
        updated_ns=ref.record.updated_ns if ref else None,
        key_id=key_name(stored.domain),
        manifest=stored.manifest,
        base=stored.base.digest if stored.base else None,
        files=tuple(files),
        wake_bytes=stored.wake.size_bytes,
        record_bytes=stored.link.size_bytes,
        packs=len(packs),
    )


def list_refs(repository: Repository) -> list[RefLine]:
    """All refs, those that cannot be read too. Raises StoreError."""
    lines = map_ordered(
        functools.partial(_ref_line, repository),
        repository.refs(),
        workers=_PARALLEL,
        ahead=2 * _PARALLEL,
    )
    return [line for line in lines if line is not None]


def key_name(domain: Domain) -> str:
    """A domain's key id as it is shown, empty for what is plain."""
    return "" if domain.is_plain else domain.key_id.hex()


def _ref_line(repository: Repository, name: str) -> RefLine | None:
    try:
        ref: StoredRef | None = repository.read_ref(name)
    except (DataError, ObjectMissing) as error:
        return RefLine(name, "", "", 0, str(error))
    if ref is None:  # it was deleted since it was listed
        return None
    return RefLine(name, ref.record.snapshot, key_name(ref.domain), ref.record.updated_ns)


def _base_chunks(repository: Repository, stored: StoredSnapshot) -> frozenset[bytes]:
    if stored.base is None:
        return frozenset()
    base = repository.read_snapshot(stored.base.digest, stored.base.manifest)
    return frozenset(entry.chunk_id for file in (base.memory, base.disk) for entry in file)


def _content(name: str, file: FileMap, base: frozenset[bytes]) -> Content:
    shared = [entry for entry in file if entry.chunk_id in base]
    return Content(
        name=name,
        size_bytes=file.size_bytes,
        windows=file.windows,
        content_bytes=sum(window_length(entry.window, file.size_bytes) for entry in file),
        stored_bytes=_stored(file),
        shared_windows=len(shared),
        shared_bytes=_stored(shared),
    )


def _stored(entries: Iterable[Entry]) -> int:
    return sum(entry.location.length for entry in entries)
