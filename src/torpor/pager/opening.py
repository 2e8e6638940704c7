"""Opening a snapshot for a wake: ref, then manifest and the wake object's beginning side by side.

Two serial round trips, one when the digest is known. What the ref says of the manifest is enough to
serve the files and to start a VMM meanwhile. The records of images come after that: a read of an
image waits for its record, as one of memory waits for its map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import Damaged, ObjectMissing
from torpor.host.sparse import hash_extents, write_at
from torpor.host.threads import submit
from torpor.pager.expected import Arrival
from torpor.pager.spans import Spans
from torpor.snapshot.repository.fetching import Plan, fetch, open_window
from torpor.snapshot.repository.records import Kind, damaged
from torpor.snapshot.repository.repository import pack_key
from torpor.snapshot.repository.working_set import open_segment, segment_windows, touched_windows
from torpor.snapshot.windows import WINDOW_BYTES, window_length

if TYPE_CHECKING:
    import concurrent.futures
    from pathlib import Path

    from torpor.snapshot.local import LocalSnapshots
    from torpor.snapshot.repository.filemap import FileMap
    from torpor.snapshot.repository.records import SegmentRecord, WakeLink
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stored import Resolved, StoredSnapshot, WakeHeader

_BEGINNING_BYTES: Final = 512 * 1024


@dataclass(frozen=True)
class OpenedSnapshot:
    """A snapshot's record, its wake header, and the beginning of the wake object's bytes.

    The beginning holds at least the header and the files in it.
    """

    stored: StoredSnapshot
    manifest_object: bytes
    wake: WakeHeader
    beginning: bytes


def open_snapshot(
    repository: Repository,
    resolved: Resolved,
    pool: concurrent.futures.ThreadPoolExecutor,
    *,
    spans: Spans | None = None,
) -> OpenedSnapshot:
    """Everything that a wake needs before the guest runs, verified.

    `spans` gets `manifest` and `wake object`. Raises Damaged, ObjectMissing, KeyMissing,
    Incompatible naming the object.
    """
    clock = spans or Spans()
    ref, beginning = resolved.ref, None
    wake = None if ref is None else ref.record.wake
    if wake is not None:
        beginning = submit(pool, lambda: _read_beginning(repository, wake, clock))
    with clock.span("manifest"):
        encoded = repository.read_linked(resolved.link, Kind.MANIFEST)
        stored = repository.decode_resolved(resolved, encoded)
    data = b"" if beginning is None else beginning.result()
    if wake != stored.wake:  # by digest, or a ref that names another push's wake object
        data = _read_beginning(repository, stored.wake, clock)
    header = repository.decode_wake(stored.wake, data[: stored.wake.header_bytes])
    files = [header.files["vmstate"]]
    if "disk" in header.files:
        files.append(header.files["disk"])
    data += _rest(repository, stored.wake, files, len(data))
    return OpenedSnapshot(stored, encoded, header, data)


def preloaded(opened: OpenedSnapshot, segment: SegmentRecord, *, size_bytes: int) -> Arrival | None:
    """A segment's windows, if it came with the wake object's beginning; its file has `size_bytes`.

    Raises Damaged.
    """
    begin = opened.wake.link.header_bytes + segment.offset
    if begin + segment.length > len(opened.beginning):
        return None
    key, sealed = opened.wake.link.key, opened.beginning[begin : begin + segment.length]
    try:
        content = open_segment(opened.wake.domain, key, segment, sealed, size_bytes=size_bytes)
        windows = segment_windows(segment, data_bytes=segment.offset + segment.length)
    except Damaged as error:
        raise damaged(key, str(error)) from None
    arrival = Arrival(windows)
    arrival.bring(content, size_bytes=size_bytes)
    return arrival


def publish(
    repository: Repository, opened: OpenedSnapshot, snapshots: LocalSnapshots, *, memory: Path
) -> None:
    """Let the snapshot appear on this node: device state and disk as files, memory served.

    `memory` is where the pager serves it. Raises Damaged, ObjectMissing, NoSpace; StoreError.
    """
    stored, manifest = opened.stored, opened.stored.manifest
    with snapshots.stage() as staging:
        vmstate = opened.wake.files["vmstate"]
        if vmstate.size_bytes != manifest.vmstate.size_bytes:
            raise damaged(stored.wake.key, f"a vmstate of {vmstate.size_bytes} bytes")
        _write(staging.vmstate, opened, vmstate)
        disk = opened.wake.files.get("disk")
        if disk is not None and disk.size_bytes == stored.disk.size_bytes:
            _write(staging.disk, opened, disk)
        else:
            _fetch_disk(repository, stored, staging.disk)
        if hash_extents(staging.disk, manifest.disk.extents) != manifest.disk.digest:
            raise damaged(stored.link.key, "disk has another digest than its manifest says")
        staging.record_working_set(touched_windows(opened.wake, stored))
        staging.publish_served(stored.encoded_manifest, stored.digest, memory=memory)


def _write(path: Path, opened: OpenedSnapshot, file: FileMap) -> None:
    view = memoryview(opened.beginning)
    key = opened.wake.link.key
    with path.open("xb", buffering=0) as target:
        target.truncate(file.size_bytes)
        for entry in file:
            place = entry.location
            sealed = view[place.offset : place.offset + place.length]
            try:
                content = open_window(opened.wake.domain, entry.chunk_id, sealed)
            except Damaged as error:
                raise damaged(key, f"{error}, at offset {place.offset}") from None
            if len(content) != window_length(entry.window, file.size_bytes):
                raise damaged(key, f"window {entry.window} has {len(content)} bytes")
            write_at(target.fileno(), content, entry.window * WINDOW_BYTES)


def _fetch_disk(repository: Repository, stored: StoredSnapshot, path: Path) -> None:
    """A disk that is too large for a wake object."""
    plan = Plan()
    with path.open("xb", buffering=0) as target:
        target.truncate(stored.disk.size_bytes)
        plan.add_file(
            stored.disk,
            pack_key,
            size_bytes=stored.disk.size_bytes,
            domain=stored.domain,
            descriptor=target.fileno(),
        )
        fetch(repository.store, plan, arrived=lambda key, size_bytes: None)


def _read_beginning(repository: Repository, wake: WakeLink, spans: Spans) -> bytes:
    length = min(wake.size_bytes, wake.header_bytes + _BEGINNING_BYTES)
    try:
        with spans.span("wake object"):
            return repository.store.get_range(wake.key, 0, length)
    except ObjectMissing:
        raise ObjectMissing(
            f"the store has no object {wake.key}",
            reason="what points to it is there",
            hint="push the snapshot again",
        ) from None


def _rest(repository: Repository, wake: WakeLink, files: list[FileMap], length: int) -> bytes:
    end = max(
        (entry.location.offset + entry.location.length for file in files for entry in file),
        default=0,
    )
    return repository.store.get_range(wake.key, length, end - length) if end > length else b""
