"""Pull: a snapshot of the repository becomes one of this node, verified before it appears.

A reader goes the other way than a writer: ref, manifest, wake object, images, packs.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torpor.errors import Damaged, DataError, NoSpace, NotFound
from torpor.host.sparse import blake3_file, copy_sparse, hash_extents, is_zero_outside, punch_hole
from torpor.snapshot.repository.fetching import Plan, fetch, zero_windows_between
from torpor.snapshot.repository.records import damaged
from torpor.snapshot.repository.repository import pack_key
from torpor.snapshot.repository.working_set import touched_windows
from torpor.snapshot.transfer import TransferReport
from torpor.snapshot.windows import WINDOW_BYTES, window_length
from torpor.units import Digest, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torpor.snapshot.local import LocalSnapshot, LocalSnapshots, Staging
    from torpor.snapshot.manifest import Manifest, SparseFile
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import Entry, FileMap
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stored import StoredImage, StoredSnapshot, WakeHeader
    from torpor.snapshot.transfer import Progress

log = logging.getLogger("torpor.snapshot")


@dataclass(frozen=True)
class Here:
    """What a pull uses of this node and where it puts things.

    `has_image` and `adopt_image` are the image library's; `adopt_image` verifies what it is given.
    """

    snapshots: LocalSnapshots
    has_image: Callable[[str], bool]
    adopt_image: Callable[[Path, Digest], None]


def pull(
    repository: Repository,
    reference: str,
    *,
    here: Here,
    progress: Progress,
    expect: Digest | None = None,
) -> tuple[Digest, Manifest, TransferReport]:
    """Fetch a snapshot by ref or digest with the images that this node lacks.

    Windows that a parent or base on this node has already are copied from there. Everything is
    verified before it appears; nothing is left of a pull that fails. With `expect`, a ref that
    points to another snapshot is refused: that closes the replay of an old ref. Raises Conflict
    for that, NotFound for an unknown ref, Damaged and ObjectMissing naming the object, KeyMissing,
    NoSpace, Incompatible for a newer format.
    """
    began = time.perf_counter()
    resolved = repository.resolve(reference, expect=expect)
    digest, stored = resolved.digest, repository.read_resolved(resolved)
    report = TransferReport(digest)
    report.moved(stored.link.key, stored.link.size_bytes)
    with here.snapshots.stage() as staging:
        _check_space(staging, stored.manifest)
        _Pull(repository, stored, here, staging, progress, report).run()
        staging.publish_as(stored.encoded_manifest, digest)
    report.duration_s = time.perf_counter() - began
    return digest, stored.manifest, report


class _Pull:
    def __init__(
        self,
        repository: Repository,
        stored: StoredSnapshot,
        here: Here,
        staging: Staging,
        progress: Progress,
        report: TransferReport,
    ) -> None:
        self._repository = repository
        self._stored = stored
        self._here = here
        self._staging = staging
        self._progress = progress
        self._report = report
        self._copied: Digest | None = None

    def run(self) -> None:
        """Fill the staging directory and adopt the images that are missing here."""
        wake = self._repository.read_wake(self._stored.wake)
        self._report.moved(wake.link.key, wake.link.header_bytes)
        self._staging.record_working_set(touched_windows(wake, self._stored))
        images = {
            image.digest: image
            for image in self._stored.images
            if not self._here.has_image(image.digest)
        }
        arrived: list[tuple[StoredImage, Path]] = []
        plan = Plan()
        with contextlib.ExitStack() as stack:
            self._plan_wake(plan, wake, stack)
            self._plan_memory(plan, stack)
            for image in images.values():
                record = self._repository.read_image(image)
                self._report.moved(image.record.key, image.record.size_bytes)
                path = self._staging.directory / f"image-{image.digest}"
                descriptor = stack.enter_context(_created(path, record.content.size_bytes))
                self._want(plan, record.content, record.content, record.domain, descriptor)
                arrived.append((record, path))
            self._fetch(plan)
        self._verify()
        for record, path in arrived:
            if blake3_file(path) != record.digest:
                raise damaged(record.link.key, "the image has another digest than its name says")
        for record, path in arrived:
            self._here.adopt_image(path, record.digest)

    def _plan_wake(self, plan: Plan, wake: WakeHeader, stack: contextlib.ExitStack) -> None:
        size = self._stored.manifest.vmstate.size_bytes
        vmstate = wake.files["vmstate"]
        if vmstate.size_bytes != size:
            raise damaged(wake.link.key, f"a vmstate of {vmstate.size_bytes} bytes, not {size}")
        descriptor = stack.enter_context(_created(self._staging.vmstate, size))
        self._want_wake(plan, wake, vmstate, descriptor)
        descriptor = stack.enter_context(_created(self._staging.disk, self._stored.disk.size_bytes))
        disk = wake.files.get("disk")
        if disk is None:
            self._want(plan, self._stored.disk, self._stored.disk, self._stored.domain, descriptor)
        elif disk.size_bytes == self._stored.disk.size_bytes:
            self._want_wake(plan, wake, disk, descriptor)
        else:
            raise damaged(wake.link.key, f"a disk of {disk.size_bytes} bytes")

    def _want_wake(self, plan: Plan, wake: WakeHeader, file: FileMap, descriptor: int) -> None:
        plan.add_file(
            file,
            lambda _: wake.link.key,
            size_bytes=file.size_bytes,
            domain=wake.domain,
            descriptor=descriptor,
        )

    def _plan_memory(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        """Memory is a copy of what is near, if anything is, with the difference fetched over it."""
        wanted, path = self._stored.memory, self._staging.memory
        known = self._copy_near(path)
        if known is None:
            self._plan_whole_memory(plan, stack)
            return
        descriptor = stack.enter_context(_opened(path))
        for window in zero_windows_between(known, wanted):
            length = window_length(window, wanted.size_bytes)
            punch_hole(descriptor, window * WINDOW_BYTES, length)
        differing = (entry for entry in wanted if not _same(known.get(entry.window), entry))
        self._want(plan, differing, wanted, self._stored.domain, descriptor)

    def _plan_whole_memory(self, plan: Plan, stack: contextlib.ExitStack) -> None:
        wanted = self._stored.memory
        descriptor = stack.enter_context(_created(self._staging.memory, wanted.size_bytes))
        self._want(plan, wanted, wanted, self._stored.domain, descriptor)

    def _copy_near(self, path: Path) -> FileMap | None:
        """The map of the memory that was copied to `path`, if anything near could be."""
        near = self._near()
        if near is None:
            return None
        local, known = near
        try:
            copy_sparse(local.memory, path)
        except FileNotFoundError:  # it was removed meanwhile
            return None
        self._copied = local.digest
        return known

    def _near(self) -> tuple[LocalSnapshot, FileMap] | None:
        """A snapshot on this node that this one descends from, and the repository's map of it."""
        base = self._stored.base.digest if self._stored.base else None
        for digest in (self._stored.manifest.parent, base):
            if digest is None:
                continue
            with contextlib.suppress(NotFound, DataError):
                local = self._here.snapshots.get(digest)
                if local.served is not None:  # it would be fetched for that
                    continue
                known = self._repository.find_snapshot(digest, domain=self._stored.domain)
                if known is not None and known.memory.size_bytes == self._stored.memory.size_bytes:
                    return local, known.memory
        return None

    def _want(
        self,
        plan: Plan,
        entries: Iterable[Entry],
        file: FileMap,
        domain: Domain,
        descriptor: int,
    ) -> None:
        plan.add_file(
            entries, pack_key, size_bytes=file.size_bytes, domain=domain, descriptor=descriptor
        )

    def _fetch(self, plan: Plan) -> None:
        total, done = plan.stored_bytes, 0
        self._progress.step("snapshot", 0, total)

        def arrived(key: str, size_bytes: int) -> None:
            nonlocal done
            self._report.moved(key, size_bytes)
            done += size_bytes
            self._progress.step("snapshot", min(done, total), total)

        fetch(self._repository.store, plan, arrived=arrived)

    def _verify(self) -> None:
        """The files against the node's manifest: nothing else is ever trusted."""
        manifest, staging = self._stored.manifest, self._staging
        if blake3_file(staging.vmstate) != manifest.vmstate.digest:
            raise self._wrong("vmstate")
        if not _matches(staging.disk, manifest.disk):
            raise self._wrong("disk")
        while not _matches(staging.memory, manifest.memory):
            if self._copied is None:
                raise self._wrong("memory")
            self._fetch_whole_memory(self._copied)
        self._report.raw_bytes = manifest.memory.data_bytes + manifest.disk.data_bytes

    def _fetch_whole_memory(self, copied: Digest) -> None:
        """What was copied on this node is not what the repository says of it: do without."""
        log.warning("snapshot differs from what its store says digest=%s", copied)
        self._copied = None
        self._staging.memory.unlink()
        plan = Plan()
        with contextlib.ExitStack() as stack:
            self._plan_whole_memory(plan, stack)
            self._fetch(plan)

    def _wrong(self, name: str) -> Damaged:
        return damaged(self._stored.link.key, f"{name} has another content than its manifest says")


def _matches(path: Path, file: SparseFile) -> bool:
    return hash_extents(path, file.extents) == file.digest and is_zero_outside(path, file.extents)


def _same(left: Entry | None, right: Entry) -> bool:
    return left is not None and left.chunk_id == right.chunk_id


@contextlib.contextmanager
def _created(path: Path, size_bytes: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _set_size(descriptor, size_bytes)
        yield descriptor
    finally:
        os.close(descriptor)


def _set_size(descriptor: int, size_bytes: int) -> None:
    try:
        os.ftruncate(descriptor, size_bytes)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise NoSpace(
            f"a file of {format_size(size_bytes)} is larger than this file system takes"
        ) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_space(staging: Staging, manifest: Manifest) -> None:
    needed = manifest.memory.data_bytes + manifest.disk.data_bytes + manifest.vmstate.size_bytes
    free = shutil.disk_usage(staging.directory).free
    if free < needed:
        raise NoSpace(
            f"the snapshot needs {format_size(needed)}, {format_size(free)} are free",
            hint="free some space, or use another --home",
        )
