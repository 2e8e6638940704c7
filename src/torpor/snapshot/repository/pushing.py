"""Push: a snapshot of this node becomes objects of the repository, only what is new of it.

A writer MUST write packs before their index, all packs before the wake object, that before the
manifest, and the manifest before the ref (docs/format.md, "Order of writing").
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.errors import DataError, ObjectMissing
from torpor.host.barrier import reach
from torpor.host.sparse import data_extents
from torpor.host.threads import executor
from torpor.snapshot.manifest import encode_manifest, outline_of
from torpor.snapshot.repository.filemap import Entry, Location, encode_map
from torpor.snapshot.repository.known import Known
from torpor.snapshot.repository.lease import Lease
from torpor.snapshot.repository.packing import PACK_BYTES, PackWriter
from torpor.snapshot.repository.records import (
    BaseLink,
    ImageLink,
    ImageRecord,
    Link,
    SnapshotRecord,
    WakeLink,
    hash_bytes,
    seal,
)
from torpor.snapshot.repository.repository import (
    image_prefix,
    lost_race,
    new_id,
    pack_key,
    snapshot_prefix,
)
from torpor.snapshot.repository.sealing import Sealer, Source
from torpor.snapshot.repository.stored import StoredRef, StoredSnapshot
from torpor.snapshot.repository.wake import WakeObject
from torpor.snapshot.transfer import TransferReport
from torpor.snapshot.windows import WINDOW_BYTES, covering_windows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.transfer import Progress
    from torpor.units import Digest


@dataclass(frozen=True)
class PushOptions:
    """How to push: zstd level, size at which a pack is sent, threads that hash and seal."""

    level: int = 3
    pack_bytes: int = PACK_BYTES
    workers: int = 2


def push(
    repository: Repository,
    snapshot: LocalSnapshot,
    *,
    ref: str,
    images: Mapping[Digest, Path],
    base: LocalSnapshot | None,
    progress: Progress,
    options: PushOptions | None = None,
    known: str | None = None,
) -> TransferReport:
    """Send what the repository lacks of a snapshot and its images, then point `ref` to it.

    `images` has the files of the snapshot's image and app. `base`, where this node has it, goes
    along without a ref: other functions of the same image build on it. Cut off at any point it
    leaves objects that no ref names; repeated, it sends only what had not arrived. With `known`
    the ref must mean that snapshot before, or this one already; empty: nothing. Raises Conflict
    when it does not, and when somebody else moved the ref meanwhile, StoreError, DeadlineExceeded
    when its lease ran out.
    """
    report = TransferReport(snapshot.digest)
    began = time.perf_counter()
    before = repository.read_ref_to_replace(ref)
    if known is not None and isinstance(before, StoredRef | None):
        found = before.record.snapshot if before else ""
        if found not in (known, snapshot.digest):
            raise lost_race(ref, before)
    if not isinstance(before, StoredRef) or not _is_whole(repository, before, snapshot):
        with Lease(repository, "push") as lease, executor(4) as pool:
            pusher = _Pusher(repository, images, progress, options or PushOptions(), report)
            pusher.writer = PackWriter(
                repository, pool, sent=pusher.sent, pack_bytes=pusher.options.pack_bytes
            )
            manifest, wake, links = pusher.snapshot(snapshot, base)
            lease.check()
            reach("upload sent")
            repository.write_ref(
                ref,
                snapshot=snapshot.digest,
                manifest=manifest,
                wake=wake,
                before=before,
                outline=outline_of(snapshot.manifest),
                images=links,
            )
    report.duration_s = time.perf_counter() - began
    return report


def _is_whole(repository: Repository, ref: StoredRef, snapshot: LocalSnapshot) -> bool:
    """Whether the ref means this snapshot and all that it leads to is there.

    One of an earlier writer, without an outline, is written again.
    """
    if (
        ref.outline is None
        or ref.record.snapshot != snapshot.digest
        or ref.domain.key_id != repository.domain.key_id
    ):
        return False
    try:
        stored = repository.read_snapshot(ref.record.snapshot, ref.record.manifest)
        images = [repository.read_image(image) for image in stored.images]
    except (ObjectMissing, DataError):
        return False
    sizes = {info.key: info.size_bytes for info in repository.store.list("packs/")}
    return _has(repository, stored.wake) and all(
        sizes.get(pack_key(pack), 0) >= end
        for file in (stored.memory, stored.disk, *(image.content for image in images))
        for pack, end in file.pack_ends().items()
    )


def _has(repository: Repository, link: WakeLink) -> bool:
    found = next((i for i in repository.store.list(_folder(link.key)) if i.key == link.key), None)
    return found is not None and found.size_bytes == link.size_bytes


def _folder(key: str) -> str:
    return key[: key.rindex("/") + 1]


class _Pusher:
    """One push: what it knows of the repository and what it has sent."""

    writer: PackWriter

    def __init__(
        self,
        repository: Repository,
        images: Mapping[Digest, Path],
        progress: Progress,
        options: PushOptions,
        report: TransferReport,
    ) -> None:
        self._repository = repository
        self._domain = repository.domain
        self._images = images
        self._progress = progress
        self.options = options
        self._report = report
        self._known = Known(repository)
        self._sealer = Sealer(repository.domain, level=options.level, workers=options.workers)
        self._new: dict[bytes, Location] = {}

    def snapshot(
        self, local: LocalSnapshot, base: LocalSnapshot | None
    ) -> tuple[Link, WakeLink, tuple[ImageLink, ...]]:
        """The links of a snapshot that is then whole in the repository: record, wake, images."""
        stored = self._find(local.digest)
        if stored is not None and self._is_whole(stored):
            return stored.link, stored.wake, stored.images
        if base is not None and base.digest != local.digest:
            self.snapshot(base, None)
        parent = self._find(local.manifest.parent) if local.manifest.parent else None
        images = tuple(self._image(digest) for digest in _images_of(local))
        memory = self._memory(local, parent)
        disk_copy: list[tuple[Entry, bytes]] = []
        disk = self._file(
            f"{local.manifest.kind} disk", local.disk, local.manifest.disk.extents, copies=disk_copy
        )
        self.writer.flush()  # arrives while the wake object is made
        made = self._make_wake(local, disk_copy)
        self.writer.finish()
        wake = self._put_wake(*made)
        record = SnapshotRecord(
            manifest=encode_manifest(local.manifest),
            memory=encode_map(local.manifest.memory.size_bytes, memory),
            disk=encode_map(local.manifest.disk.size_bytes, disk),
            wake=wake,
            images=images,
            base=self._base_link(base, parent),
        )
        prefix = snapshot_prefix(self._domain, local.digest)
        return self._put(f"{prefix}{new_id().hex()}/manifest", record), wake, images

    def sent(self, key: str, size_bytes: int) -> None:
        """An object has arrived; what this push does next may build on it. Any thread."""
        self._report.moved(key, size_bytes)
        self._known.arrived(key, size_bytes)

    # files

    def _memory(self, local: LocalSnapshot, parent: StoredSnapshot | None) -> list[Entry]:
        written = local.written()
        unread = None if parent is None or written is None else parent.memory
        return self._file(
            f"{local.manifest.kind} memory",
            local.memory,
            local.manifest.memory.extents,
            source=Source(unread, frozenset(covering_windows(written or ()))),
        )

    def _image(self, digest: Digest) -> ImageLink:
        stored = self._repository.find_image(digest, without=self._known.condemned)
        if stored is not None and self._known.has_all(stored.content):
            size = stored.content.size_bytes
            return ImageLink(digest=digest, size_bytes=size, record=stored.link)
        path = self._images[digest]
        size = path.stat().st_size
        entries = self._file(f"image {digest[:12]}", path, _data_extents(path))
        self.writer.finish()
        record = ImageRecord(digest=digest, content=encode_map(size, entries))
        key = f"{image_prefix(self._domain, digest)}{new_id().hex()}"
        return ImageLink(digest=digest, size_bytes=size, record=self._put(key, record))

    def _file(
        self,
        what: str,
        path: Path,
        extents: tuple[tuple[int, int], ...],
        *,
        source: Source | None = None,
        copies: list[tuple[Entry, bytes]] | None = None,
    ) -> list[Entry]:
        """Entries for all windows of a file that are not zero, their chunks sent if new."""
        windows = list(covering_windows(extents))
        total, done = len(windows) * WINDOW_BYTES, 0
        self._progress.step(what, 0, total)
        entries: list[Entry] = []
        batches = self._sealer.seal(
            path, windows, self._known.chunks, source or Source(), always=copies is not None
        )
        for batch in batches:
            for item in batch.items:
                entry = item.entry or self._take(item.window, item.chunk_id, item.sealed)
                entries.append(entry)
                if copies is not None:
                    copies.append((entry, item.sealed))
            self._report.raw_bytes += batch.read_bytes
            self._report.unread_bytes += batch.unread_bytes
            done += batch.windows * WINDOW_BYTES
            self._progress.step(what, done, total)
        return entries

    def _take(self, window: int, chunk_id: bytes, sealed: bytes) -> Entry:
        location = self._new.get(chunk_id)
        if location is None:
            location = self._new[chunk_id] = self.writer.add(chunk_id, sealed)
        return Entry(window, chunk_id, location)

    # objects

    def _make_wake(
        self, local: LocalSnapshot, disk: list[tuple[Entry, bytes]]
    ) -> tuple[WakeLink, bytes]:
        prefix = snapshot_prefix(self._domain, local.digest)
        wake = WakeObject(self._domain, f"{prefix}{new_id().hex()}/wake")
        vmstate_bytes = local.manifest.vmstate.size_bytes
        wake.add_file("vmstate", vmstate_bytes, self._sealer.seal_all(local.vmstate, vmstate_bytes))
        wake.add_disk(local.manifest.disk.size_bytes, disk)
        function = local.manifest.function
        images = {"image": self._images[local.manifest.image]}
        if function is not None:
            images["app"] = self._images[function.app]
        wake.add_working_set(local, images, level=self.options.level)
        return wake.finish()

    def _put_wake(self, link: WakeLink, data: bytes) -> WakeLink:
        self._repository.store.put(link.key, data)
        self._report.moved(link.key, len(data))
        return link

    def _put(self, key: str, record: SnapshotRecord | ImageRecord) -> Link:
        data = seal(self._domain, key, record)
        self._repository.store.put(key, data)
        self._report.moved(key, len(data))
        return Link(key=key, size_bytes=len(data), hash=hash_bytes(data))

    # what is there

    def _find(self, digest: Digest) -> StoredSnapshot | None:
        """A record of a snapshot on whose every pack this push may build."""
        condemned = self._known.condemned
        stored = self._repository.find_snapshot(digest, domain=self._domain, without=condemned)
        if stored is None or not self._known.has_all(stored.memory, stored.disk):
            return None
        return stored

    def _is_whole(self, stored: StoredSnapshot) -> bool:
        """Whether a ref may point to what another push left of the same snapshot."""
        keys = {stored.wake.key, *(image.record.key for image in stored.images)}
        if keys & self._known.condemned or not _has(self._repository, stored.wake):
            return False
        if stored.base is not None and not self._is_usable(stored.base):
            return False
        try:
            images = [self._repository.read_image(image) for image in stored.images]
        except (ObjectMissing, DataError):
            return False
        return self._known.has_all(*(image.content for image in images))

    def _base_link(
        self, base: LocalSnapshot | None, parent: StoredSnapshot | None
    ) -> BaseLink | None:
        stored = self._find(base.digest) if base is not None else None
        if stored is not None:
            return BaseLink(digest=stored.digest, manifest=stored.link)
        link = parent.base if parent is not None else None
        return link if link is not None and self._is_usable(link) else None

    def _is_usable(self, base: BaseLink) -> bool:
        """Whether a base that another record names is there, whole, and stays."""
        try:
            stored = self._repository.read_snapshot(base.digest, base.manifest)
            return (
                base.manifest.key not in self._known.condemned
                and stored.base is None
                and self._known.has_all(stored.memory, stored.disk)
                and self._is_whole(stored)
            )
        except (ObjectMissing, DataError):
            return False


def _images_of(local: LocalSnapshot) -> list[Digest]:
    function = local.manifest.function
    return [local.manifest.image, *([function.app] if function else [])]


def _data_extents(path: Path) -> tuple[tuple[int, int], ...]:
    with path.open("rb") as stream:
        return tuple(data_extents(stream.fileno()))
