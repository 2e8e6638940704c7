"""One repository: the objects below a store's prefix, read with a keyring (docs/format.md)."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Final

from torpor.errors import (
    Conflict,
    Damaged,
    DataError,
    NotFound,
    ObjectConflict,
    ObjectMissing,
)
from torpor.host.threads import map_ordered
from torpor.snapshot.manifest import (
    Manifest,
    decode_manifest,
    decode_outline,
    encode_manifest,
)
from torpor.snapshot.repository.filemap import (
    PACK_ID_BYTES,
    decode_map,
)
from torpor.snapshot.repository.links import (
    check_images,
    check_ref,
    check_snapshot,
    longest_object,
)
from torpor.snapshot.repository.records import (
    CondemnedRecord,
    ImageLink,
    ImageRecord,
    Kind,
    Link,
    RefRecord,
    SnapshotRecord,
    WakeLink,
    WakeRecord,
    check_link,
    damaged,
    hash_bytes,
    seal,
    unseal,
)
from torpor.snapshot.repository.stored import (
    BrokenRef,
    Resolved,
    StoredImage,
    StoredRef,
    StoredSnapshot,
    WakeHeader,
    ref_key,
)
from torpor.snapshot.repository.working_set import segment_windows
from torpor.store.interface import Absent, Etag
from torpor.units import Digest, is_name, parse_digest, parse_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.keys import Keyring
    from torpor.store.interface import Store

SELF_PACK: Final = bytes(PACK_ID_BYTES)
"""The pack id by which a wake object's maps mean the object itself."""

_PARALLEL: Final = 8


class Repository:
    """Reads and writes the objects of a repository. Blocking; any thread may use it.

    Every method may raise StoreError. What it reads is checked: Damaged, Incompatible (a newer
    format) and KeyMissing name the object.
    """

    def __init__(self, store: Store, keyring: Keyring) -> None:
        self.store = store
        self.keyring = keyring
        self.domain = keyring.current

    # refs

    def read_ref(self, name: str) -> StoredRef | None:
        """What a name points to, None if there is no such ref."""
        return self._read_ref(name, self.keyring)

    def read_ref_to_replace(self, name: str) -> StoredRef | BrokenRef | None:
        """Like `read_ref`, for a writer, whom neither damage nor a plain ref need stop.

        Who has a key may seal what was plain, and mend what is damaged.
        """
        keyring = self.keyring.with_plain()
        try:
            return self._read_ref(name, keyring)
        except Damaged:
            pass
        try:
            etag = self.store.head(ref_key(name)).etag
            return self._read_ref(name, keyring)  # again, so that the tag is of nothing newer
        except ObjectMissing:
            return None
        except Damaged:
            return BrokenRef(etag)

    def _read_ref(self, name: str, keyring: Keyring) -> StoredRef | None:
        try:
            data, etag = self.store.get(ref_key(name), limit_bytes=longest_object(Kind.REF))
        except ObjectMissing:
            return None
        return _open_ref(name, keyring, data, etag)

    def write_ref(
        self,
        name: str,
        *,
        snapshot: Digest,
        manifest: Link,
        wake: WakeLink,
        before: StoredRef | BrokenRef | None,
        outline: Manifest | None = None,
        images: tuple[ImageLink, ...] = (),
    ) -> None:
        """Point a name to a snapshot if it still is as it was read.

        With the snapshot's outline and images a wake starts its VM before it has the manifest.
        Raises Conflict, changing nothing, when somebody else wrote it meanwhile.
        """
        key = ref_key(name)
        record = RefRecord(
            name=name,
            snapshot=snapshot,
            manifest=manifest,
            wake=wake,
            updated_ns=time.time_ns(),
            outline=b"" if outline is None else encode_manifest(outline),
            images=images,
        )
        condition = Absent() if before is None else Etag(before.etag)
        try:
            self.store.put(key, seal(self.domain, key, record), condition=condition)
        except (ObjectConflict, ObjectMissing):
            raise lost_race(name, self.read_ref_to_replace(name)) from None

    def delete_ref(self, name: str) -> None:
        """Forget a name, sound or not; what it pointed to is left to collections.

        Raises NotFound.
        """
        try:
            self.store.head(ref_key(name))
        except ObjectMissing:
            raise NotFound(
                f"there is no ref {name!r} in the store", hint="`torpor store ls` lists"
            ) from None
        self.store.delete(ref_key(name))

    def refs(self) -> list[str]:
        """The names of all refs."""
        names = (info.key.removeprefix("refs/") for info in self.store.list("refs/"))
        return [name for name in names if is_name(name)]

    # snapshots

    def resolve(
        self, reference: str, *, expect: Digest | None = None, ref: bytes = b""
    ) -> Resolved:
        """The snapshot that a ref or a whole digest means, with `expect` only that: Conflict.

        `ref` is the ref's object if it was just read: the store is not asked then. Raises NotFound;
        Damaged and the like when what there is of it cannot be used.
        """
        found = self._resolve(reference, ref)
        if expect is not None and found.digest != expect:
            raise Conflict(
                f"{reference} points to snapshot {found.digest[:12]}, not to {expect[:12]}",
                reason="it was moved, or an old ref was put back",
                hint="ask whoever pushed it which snapshot is the right one",
            )
        return found

    def _resolve(self, reference: str, sealed: bytes) -> Resolved:
        if len(reference) == 64:
            problems: list[DataError] = []
            found = self.find_snapshot(parse_digest(reference), problems=problems)
            if found is None:
                raise next(iter(problems), None) or NotFound(
                    f"the store has no snapshot {reference[:12]}",
                    hint="push it from a node that has it",
                )
            return Resolved(found.digest, found.link)
        name = parse_name(reference, what="ref name")
        ref = _open_ref(name, self.keyring, sealed, "") if sealed else self.read_ref(name)
        if ref is None:
            raise NotFound(
                f"there is no {reference!r}, neither on this node nor in the store",
                hint="`torpor ls` and `torpor snapshot ls` list what is here; push it where it is",
            )
        return Resolved(ref.record.snapshot, ref.record.manifest, ref)

    def read_snapshot(self, digest: Digest, link: Link) -> StoredSnapshot:
        """A snapshot's record by the link that points to it."""
        return self.read_resolved(Resolved(digest, link))

    def read_resolved(self, resolved: Resolved) -> StoredSnapshot:
        """The record that a ref or digest means, checked against what the ref says of it."""
        return self.decode_resolved(resolved, self.read_linked(resolved.link, Kind.MANIFEST))

    def decode_resolved(self, resolved: Resolved, data: bytes) -> StoredSnapshot:
        """`read_resolved` of the bytes of its object."""
        stored = self.decode_snapshot(resolved.digest, resolved.link, data)
        if resolved.ref is not None:
            resolved.ref.check(stored)
        return stored

    def find_snapshot(
        self,
        digest: Digest,
        *,
        domain: Domain | None = None,
        without: Iterable[str] = (),
        problems: list[DataError] | None = None,
    ) -> StoredSnapshot | None:
        """A sound record of a snapshot that some ref or push put there, by digest.

        Only those of `domain`, if it is given, and none whose key is in `without`. What is wrong
        with the others is added to `problems`.
        """
        avoided = set(without)
        for candidate in [domain] if domain else self._domains():
            prefix = snapshot_prefix(candidate, digest)
            for info in self.store.list(prefix):
                if info.key in avoided or not info.key.endswith("/manifest"):
                    continue
                try:
                    data, _ = self.store.get(info.key, limit_bytes=longest_object(Kind.MANIFEST))
                    link = Link(key=info.key, size_bytes=len(data), hash=hash_bytes(data))
                    found = self.decode_snapshot(digest, link, data)
                    if found.domain.key_id == candidate.key_id:
                        return found
                except ObjectMissing:
                    continue
                except DataError as error:  # another push's may be sound
                    if problems is not None:
                        problems.append(error)
        return None

    def read_wake(self, link: WakeLink) -> WakeHeader:
        """The header of a wake object."""
        try:
            header = self.store.get_range(link.key, 0, link.header_bytes)
        except ObjectMissing:
            raise _missing(link.key) from None
        return self.decode_wake(link, header)

    def decode_wake(self, link: WakeLink, header: bytes) -> WakeHeader:
        """The header of a wake object from its bytes, the maps' offsets made the object's own."""
        check_link(link, header)
        record, domain = unseal(self.keyring, link.key, header, WakeRecord)
        files = {}
        data_bytes = link.size_bytes - link.header_bytes
        for name, encoded in record.files.items():
            try:
                decoded = decode_map(
                    encoded, largest_pack_bytes=data_bytes, origin=link.header_bytes
                )
            except Damaged as error:
                raise damaged(link.key, f"{name}: {error}") from None
            if decoded.packs() - {SELF_PACK}:
                raise damaged(link.key, f"{name} lies in another object")
            files[name] = decoded
        if "vmstate" not in files:
            raise damaged(link.key, "it has no vmstate")
        for segment in record.working_set:
            try:
                segment_windows(segment, data_bytes=data_bytes)
            except Damaged as error:
                raise damaged(link.key, str(error)) from None
        return WakeHeader(link, domain, files, record.working_set)

    # images

    def read_image(self, image: ImageLink) -> StoredImage:
        """An image's record by the link that points to it."""
        data = self.read_linked(image.record, Kind.IMAGE)
        found = self.decode_image(image.digest, image.record, data)
        if found.content.size_bytes != image.size_bytes:
            raise damaged(image.record.key, "its image has another length than its link says")
        return found

    def find_image(self, digest: Digest, *, without: Iterable[str] = ()) -> StoredImage | None:
        """A sound record of an image in the current domain, none whose key is in `without`."""
        avoided = set(without)
        for info in self.store.list(image_prefix(self.domain, digest)):
            if info.key in avoided:
                continue
            try:
                data, _ = self.store.get(info.key, limit_bytes=longest_object(Kind.IMAGE))
                link = Link(key=info.key, size_bytes=len(data), hash=hash_bytes(data))
                found = self.decode_image(digest, link, data)
                if found.domain.key_id == self.domain.key_id:
                    return found
            except (ObjectMissing, DataError):
                continue
        return None

    def condemned_keys(self) -> frozenset[str]:
        """All that a collection is going to delete: a push must not build on any of it."""
        infos = list(self.store.list("condemned/"))
        found = map_ordered(
            self.read_condemned,
            [info.key for info in infos],
            workers=_PARALLEL,
            ahead=2 * _PARALLEL,
        )
        return frozenset(key for record in found if record for key in record.keys)

    def read_condemned(self, key: str) -> CondemnedRecord | None:
        """A collection's list of what it is going to delete, None if it has ended."""
        try:
            data, _ = self.store.get(key, limit_bytes=longest_object(Kind.CONDEMNED))
        except ObjectMissing:
            return None
        return unseal(self.keyring, key, data, CondemnedRecord)[0]

    # inside

    def decode_snapshot(self, digest: Digest, link: Link, data: bytes) -> StoredSnapshot:
        """A snapshot's record from the bytes of its object."""
        record, domain = unseal(self.keyring, link.key, data, SnapshotRecord)
        try:
            manifest = decode_manifest(record.manifest, digest)
            memory = decode_map(record.memory)
            disk = decode_map(record.disk)
        except Damaged as error:
            raise damaged(link.key, str(error)) from None
        if (memory.size_bytes, disk.size_bytes) != (
            manifest.memory.size_bytes,
            manifest.disk.size_bytes,
        ):
            raise damaged(link.key, "its maps are not of the manifest's files")
        check_snapshot(link.key, record)
        check_images(link.key, manifest, record.images)
        return StoredSnapshot(
            digest=digest,
            link=link,
            domain=domain,
            manifest=manifest,
            encoded_manifest=record.manifest,
            memory=memory,
            disk=disk,
            wake=record.wake,
            images=record.images,
            base=record.base,
        )

    def decode_image(self, digest: Digest, link: Link, data: bytes) -> StoredImage:
        """An image's record from the bytes of its object."""
        record, domain = unseal(self.keyring, link.key, data, ImageRecord)
        if record.digest != digest:
            raise damaged(link.key, "it is the record of another image")
        try:
            content = decode_map(record.content)
        except Damaged as error:
            raise damaged(link.key, str(error)) from None
        return StoredImage(digest, link, domain, content)

    def read_linked(self, link: Link, kind: Kind) -> bytes:
        """The bytes of the object that a link vouches for."""
        if not 0 < link.size_bytes <= longest_object(kind):
            raise damaged(link.key, f"a length of {link.size_bytes} bytes")
        try:
            data, _ = self.store.get(link.key, limit_bytes=link.size_bytes)
        except ObjectMissing:
            raise _missing(link.key) from None
        check_link(link, data)
        return data

    def _domains(self) -> list[Domain]:
        return [self.domain, *self.keyring.others]


def snapshot_prefix(domain: Domain, digest: Digest) -> str:
    """Where the records of a snapshot are; its digest cannot be told from it without the key."""
    return f"snapshots/{domain.object_id('snapshot', digest)}/"


def image_prefix(domain: Domain, digest: Digest) -> str:
    """Where the records of an image are."""
    return f"images/{domain.object_id('image', digest)}/"


def pack_key(pack: bytes) -> str:
    """The object of a pack."""
    return f"packs/{pack.hex()}"


def index_key(pack: bytes) -> str:
    """The object that lists a pack's chunks."""
    return f"index/{pack.hex()}"


def new_id() -> bytes:
    """A random id for a pack or a push: no two writers ever write one object."""
    return secrets.token_bytes(PACK_ID_BYTES)


def _missing(key: str) -> ObjectMissing:
    return ObjectMissing(
        f"the store has no object {key}",
        reason="what points to it is there",
        hint="`torpor store check` lists what is missing; push the snapshot again",
    )


def lost_race(name: str, now: StoredRef | BrokenRef | None) -> Conflict:
    """Somebody else wrote a ref: this is what it is now."""
    match now:
        case StoredRef():
            reason = f"it points to snapshot {now.record.snapshot[:12]}"
        case BrokenRef():
            reason = "it is damaged now"
        case None:
            reason = "it was deleted"
    return Conflict(
        f"somebody else wrote {name} in the store meanwhile",
        reason=reason,
        hint="look at that one first; pushing again replaces it",
    )


def _open_ref(name: str, keyring: Keyring, data: bytes, etag: str) -> StoredRef:
    key = ref_key(name)
    record, domain = unseal(keyring, key, data, RefRecord)
    if record.name != name:
        raise damaged(key, f"it was written for the name {record.name!r}")
    check_ref(key, record)
    outline = None
    if record.outline or record.images:
        try:
            outline = decode_outline(record.outline, record.snapshot)
        except Damaged as error:
            raise damaged(key, str(error)) from None
        check_images(key, outline, record.images)
    return StoredRef(record, etag, data, domain, outline)
