"""Snapshots through a store as whole files: the plain way that benchmarks compare with.

Nothing of it is encrypted. Its objects are below `whole/`, beside a repository's.

    whole/refs/<name>                    {"snapshot": digest, "updated_ns": n}, alone mutable
    whole/snapshots/<digest>/manifest    as on the node
    whole/snapshots/<digest>/memory      the bytes of the manifest's extents, one after the other
    whole/snapshots/<digest>/memory-all  instead of that: the file as it is, zeros too
    whole/snapshots/<digest>/disk        likewise
    whole/snapshots/<digest>/vmstate     as on the node
    whole/images/<digest>                image or app, without the zeros at its end

A writer MUST write images and files before the manifest, and the manifest before the ref. A reader
MUST check every digest before it uses what it got, and every length before it allocates.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import functools
import os
import shutil
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import blake3
import msgspec

from torpor.errors import (
    Conflict,
    Damaged,
    InvalidInput,
    NoSpace,
    NotFound,
    ObjectConflict,
    ObjectMissing,
)
from torpor.host.cancel import checkpoint
from torpor.host.threads import map_ordered
from torpor.snapshot.manifest import Manifest, decode_manifest, encode_manifest
from torpor.snapshot.transfer import TransferReport
from torpor.store.interface import Absent, Etag
from torpor.structs import prepared
from torpor.units import Digest, format_size, parse_digest, parse_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torpor.snapshot.local import LocalSnapshot, LocalSnapshots, Staging
    from torpor.snapshot.manifest import PlainFile, SparseFile
    from torpor.snapshot.transfer import Progress
    from torpor.store.interface import Store

_STEP_BYTES: Final = 8 * 1024 * 1024
_REF_LIMIT: Final = 4096
_MANIFEST_LIMIT: Final = 64 * 1024 * 1024
_IMAGE_LIMIT: Final = 64 * 1024**3
_PARALLEL: Final = 4
_ALL_MEMORY: Final = "memory-all"


class _Ref(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    snapshot: str
    updated_ns: int


def push(
    store: Store,
    snapshot: LocalSnapshot,
    *,
    ref: str,
    images: Mapping[Digest, Path],
    progress: Progress,
    zeros: bool = False,
) -> TransferReport:
    """Send a snapshot and its images, then point `ref` to it. What is there is not sent again.

    With `zeros` memory is sent as it is, as tools do that know a memory file only. Cut off half-way
    it leaves objects that no ref names; repeating it completes them. Raises Conflict when somebody
    else moved the ref meanwhile, StoreError.
    """
    key = _ref_key(ref)
    report = TransferReport(snapshot.digest)
    began = time.perf_counter()
    before = _read_ref(store, key)
    manifest, where = snapshot.manifest, f"whole/snapshots/{snapshot.digest}"
    for digest, path in images.items():
        _send(store, f"whole/images/{digest}", path, [(0, _used_bytes(path))], report, progress)
    _send(store, f"{where}/disk", snapshot.disk, manifest.disk.extents, report, progress)
    whole = [(0, manifest.vmstate.size_bytes)]
    _send(store, f"{where}/vmstate", snapshot.vmstate, whole, report, progress)
    name, extents = _memory(manifest, zeros=zeros)
    _send(store, f"{where}/{name}", snapshot.memory, extents, report, progress)
    encoded = encode_manifest(manifest)
    store.put(f"{where}/manifest", encoded)
    report.objects[f"{where}/manifest"] = len(encoded)
    _move_ref(store, key, before, snapshot.digest)
    report.duration_s = time.perf_counter() - began
    return report


def pull(
    store: Store,
    reference: str,
    *,
    snapshots: LocalSnapshots,
    adopt_image: Callable[[Path, Digest], None],
    has_image: Callable[[str], bool],
    progress: Progress,
    zeros: bool = False,
) -> tuple[Digest, Manifest, TransferReport]:
    """Fetch a snapshot by ref or digest with the images that this node lacks.

    Everything is verified before it appears on the node, but for memory that was sent with
    `zeros`, of which no digest is known; nothing is left of a pull that fails.
    Raises NotFound for an unknown ref, Damaged naming the object, NoSpace, Incompatible.
    """
    began = time.perf_counter()
    digest = _resolve(store, reference)
    report = TransferReport(digest)
    where = f"whole/snapshots/{digest}"
    encoded = _fetch_manifest(store, digest)
    manifest = decode_manifest(encoded, digest)
    report.objects[f"{where}/manifest"] = len(encoded)
    wanted = [manifest.image, *([manifest.function.app] if manifest.function else [])]
    with snapshots.stage() as staging:
        _check_space(staging, manifest)
        jobs = _file_jobs(store, manifest, where, staging, report, progress, zeros=zeros)
        missing = [image for image in wanted if not has_image(image)]
        for image in missing:
            jobs.append(_image_job(store, image, staging, adopt_image, report, progress))
        _run_all(jobs)
        staging.publish_as(encoded, digest)
    report.duration_s = time.perf_counter() - began
    return digest, manifest, report


def _file_jobs(
    store: Store,
    manifest: Manifest,
    where: str,
    staging: Staging,
    report: TransferReport,
    progress: Progress,
    *,
    zeros: bool,
) -> list[Callable[[], None]]:
    whole = ((0, manifest.vmstate.size_bytes),)
    files = (
        (*_memory(manifest, zeros=zeros), staging.memory, manifest.memory),
        ("disk", manifest.disk.extents, staging.disk, manifest.disk),
        ("vmstate", whole, staging.vmstate, manifest.vmstate),
    )

    def job(name: str, extents: _Extents, path: Path, file: SparseFile | PlainFile) -> None:
        size, digest = file.size_bytes, None if name == _ALL_MEMORY else file.digest
        _receive(store, f"{where}/{name}", path, size, extents, digest, report, progress)

    return [functools.partial(job, *file) for file in files]


_Extents = tuple[tuple[int, int], ...]


def _memory(manifest: Manifest, *, zeros: bool) -> tuple[str, _Extents]:
    """Under which name memory is sent, and which parts of it."""
    if zeros:
        return _ALL_MEMORY, ((0, manifest.memory.size_bytes),)
    return "memory", manifest.memory.extents


def _image_job(
    store: Store,
    image: Digest,
    staging: Staging,
    adopt: Callable[[Path, Digest], None],
    report: TransferReport,
    progress: Progress,
) -> Callable[[], None]:
    def job() -> None:
        key = f"whole/images/{parse_digest(image)}"
        path = staging.directory / f"image-{image}"
        used = _stored_size(store, key)
        size = _read_image_size(store, key, used)
        _receive(store, key, path, size, ((0, used - 8),), None, report, progress)
        adopt(path, image)

    return job


def _run_all(jobs: list[Callable[[], None]]) -> None:
    """Run the jobs side by side; the first failure ends it when all under way have ended."""
    with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as executor:
        futures = [executor.submit(contextvars.copy_context().run, job) for job in jobs]
        done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        for future in done:
            future.result()


def _send(
    store: Store,
    key: str,
    path: Path,
    extents: _Extents | list[tuple[int, int]],
    report: TransferReport,
    progress: Progress,
) -> None:
    """Upload the extents of a file, and for an image eight bytes with its length."""
    trailer = path.stat().st_size.to_bytes(8, "little") if key.startswith("whole/images/") else b""
    total = sum(length for _, length in extents) + len(trailer)
    report.objects[key] = 0
    try:
        if store.head(key).size_bytes == total:
            progress.step(key, total, total)
            return
    except ObjectMissing:
        pass
    store.put_stream(key, _parts(path, extents, trailer, key, total, progress))
    report.objects[key] = total


def _parts(
    path: Path,
    extents: _Extents | list[tuple[int, int]],
    trailer: bytes,
    key: str,
    total: int,
    progress: Progress,
) -> Iterator[bytes]:
    done = 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, length in extents:
            for begin in range(offset, offset + length, _STEP_BYTES):
                checkpoint()
                part = os.pread(descriptor, min(_STEP_BYTES, offset + length - begin), begin)
                done += len(part)
                yield part
                progress.step(key, done, total)
    finally:
        os.close(descriptor)
    if trailer:
        yield trailer
    progress.step(key, total, total)


def _receive(
    store: Store,
    key: str,
    path: Path,
    size: int,
    extents: _Extents,
    digest: Digest | None,
    report: TransferReport,
    progress: Progress,
) -> None:
    """Download an object to the extents of a new file; without `digest` the caller verifies."""
    total = sum(length for _, length in extents)
    stored = _stored_size(store, key)
    if digest is not None and stored != total:
        raise _damaged(key, f"it has {stored} bytes, the manifest says {total}")
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    with path.open("wb", buffering=0) as target:
        target.truncate(size)
        places = _places(extents)

        def get(position: int) -> bytes:
            return store.get_range(key, position, min(_STEP_BYTES, total - position))

        positions = range(0, total, _STEP_BYTES)
        parts = map_ordered(get, positions, workers=_PARALLEL, ahead=2 * _PARALLEL)
        for position, part in zip(positions, parts, strict=True):
            hasher.update(part)
            _scatter(target.fileno(), memoryview(part), places)
            progress.step(key, position + len(part), total)
    if digest is not None and hasher.hexdigest() != digest:
        raise _damaged(key, "its digest is another")
    report.objects[key] = total


def _places(extents: _Extents) -> deque[tuple[int, int]]:
    return deque((offset, length) for offset, length in extents if length)


def _scatter(descriptor: int, part: memoryview, places: deque[tuple[int, int]]) -> None:
    """Write a piece of the object where it belongs in the file; what is filled leaves `places`."""
    while part:
        offset, length = places.popleft()
        written = min(length, len(part))
        os.pwrite(descriptor, part[:written], offset)
        part = part[written:]
        if written < length:
            places.appendleft((offset + written, length - written))


def _stored_size(store: Store, key: str) -> int:
    try:
        return store.head(key).size_bytes
    except ObjectMissing:
        raise ObjectMissing(
            f"the store has no object {key}", hint="push the snapshot again"
        ) from None


def _read_image_size(store: Store, key: str, stored: int) -> int:
    if stored < 8:
        raise _damaged(key, f"it has only {stored} bytes")
    size = int.from_bytes(store.get_range(key, stored - 8, 8), "little")
    if not stored - 8 <= size <= _IMAGE_LIMIT:
        raise _damaged(key, f"its length field says {size} bytes")
    return size


def _used_bytes(path: Path) -> int:
    """Length of a file without the hole at its end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size, end, position = os.fstat(descriptor).st_size, 0, 0
        while position < size:
            try:
                begin = os.lseek(descriptor, position, os.SEEK_DATA)
            except OSError:
                break
            end = position = os.lseek(descriptor, begin, os.SEEK_HOLE)
        return end
    finally:
        os.close(descriptor)


def _fetch_manifest(store: Store, digest: Digest) -> bytes:
    try:
        encoded, _ = store.get(f"whole/snapshots/{digest}/manifest", limit_bytes=_MANIFEST_LIMIT)
    except ObjectMissing:
        raise NotFound(
            f"the store has no snapshot {digest[:12]}", hint="push it from a node that has it"
        ) from None
    return encoded


def _resolve(store: Store, reference: str) -> Digest:
    if len(reference) == 64:
        return parse_digest(reference)
    found = _read_ref(store, _ref_key(reference))
    if found is None:
        raise NotFound(
            f"there is no {reference!r}, neither on this node nor in the store",
            hint="`torpor ls` and `torpor snapshot ls` list what is here; push it where it is",
        )
    return found[0]


def _read_ref(store: Store, key: str) -> tuple[Digest, str] | None:
    try:
        data, etag = store.get(key, limit_bytes=_REF_LIMIT)
    except ObjectMissing:
        return None
    try:
        return parse_digest(msgspec.json.decode(data, type=prepared(_Ref)).snapshot), etag
    except (msgspec.MsgspecError, InvalidInput) as error:
        raise _damaged(key, str(error)) from None


def _move_ref(store: Store, key: str, before: tuple[Digest, str] | None, digest: Digest) -> None:
    if before is not None and before[0] == digest:
        return
    data = msgspec.json.encode(_Ref(digest, time.time_ns()))
    try:
        store.put(key, data, condition=Absent() if before is None else Etag(before[1]))
    except ObjectConflict:
        now = _read_ref(store, key)
        raise Conflict(
            f"somebody else pushed {key.removeprefix('whole/refs/')} meanwhile",
            reason=f"it points to snapshot {now[0][:12]}" if now else "",
            hint="look at that one first; pushing again replaces it",
        ) from None


def _check_space(staging: Staging, manifest: Manifest) -> None:
    needed = manifest.memory.data_bytes + manifest.disk.data_bytes + manifest.vmstate.size_bytes
    free = shutil.disk_usage(staging.directory).free
    if free < needed:
        raise NoSpace(
            f"the snapshot needs {format_size(needed)}, {format_size(free)} are free",
            hint="free some space, or use another --home",
        )


def _ref_key(name: str) -> str:
    return f"whole/refs/{parse_name(name, what='ref name')}"


def _damaged(key: str, reason: str) -> Damaged:
    return Damaged(f"object {key} in the store is damaged", reason=reason, hint="push it again")
