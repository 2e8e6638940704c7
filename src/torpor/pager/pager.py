"""What a pager does for its node: opens snapshots, serves and pushes them, closes them again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import shutil
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor.errors import NotFound, TorporError
from torpor.host.threads import submit
from torpor.pager import opening
from torpor.pager.cache import open_or_none
from torpor.pager.fetcher import Fetcher
from torpor.pager.hydrating import Hydration
from torpor.pager.pushing import Pusher, WakeData
from torpor.pager.served import StoredFile
from torpor.pager.source import Source, open_repository
from torpor.pager.spans import Spans
from torpor.snapshot.local import LocalSnapshots
from torpor.snapshot.repository.records import ImageLink, Kind, Link, damaged
from torpor.store.metrics import Counters
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torpor.host.fuse.files import Node
    from torpor.host.fuse.server import Server
    from torpor.pager.opening import OpenedSnapshot
    from torpor.pager.served import ServedFiles
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.filemap import FileMap
    from torpor.snapshot.repository.repository import Repository, StoredSnapshot

_FETCHERS: Final = 6

log = logging.getLogger("torpor.pager")


class _Entry(msgspec.Struct, frozen=True):
    """What is kept of an open snapshot on disk, so that a new pager can go on with it."""

    source: Source
    digest: Digest
    link: Link
    images: tuple[ImageLink, ...]


@dataclass
class _Served:
    """A file that is served, for how many snapshots."""

    file: StoredFile
    node: Node
    users: int = 1


@dataclass
class _Opened:
    """A snapshot that is open: its files by the names that segments use."""

    stored: StoredSnapshot
    files: dict[str, _Served]
    pusher: Pusher | None = None
    hydration: Hydration | None = None
    protected: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """What a pager may use: cache bytes on disk, seconds that a window may take."""

    cache_bytes: int
    deadline_s: float


class Pager:
    """One node's pager. Any thread may call; opens of one snapshot wait for each other."""

    def __init__(self, home: Path, server: Server, files: ServedFiles, limits: Limits) -> None:
        self._home = home
        self._server = server
        self._files = files
        self._snapshots = LocalSnapshots(home / "snapshots")
        self._registry = home / "pager" / "open"
        self._kept = home / "cache" / "wake"
        for directory in (self._registry, self._kept):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cache = open_or_none(home / "cache" / "chunks", capacity_bytes=limits.cache_bytes)
        keep = self._cache.put if self._cache else lambda chunk_id, content: None
        self._fetcher = Fetcher(workers=_FETCHERS, deadline_s=limits.deadline_s, keep=keep)
        self._pool = concurrent.futures.ThreadPoolExecutor(_FETCHERS, "open")
        self._lock = threading.Lock()
        self._turns: dict[Digest, threading.Lock] = {}
        self._opened: dict[Digest, _Opened] = {}
        self._images: dict[Digest, _Served] = {}
        self._repositories: dict[Source, Repository] = {}
        self._requests = Counters()

    # what clients ask

    def open(
        self,
        reference: str,
        source: Source,
        *,
        expect: Digest | None,
        here: Sequence[str],
        push: bool,
    ) -> dict[str, Any]:
        """Open a snapshot by ref or digest; the images in `here` are the node's own business.

        It appears among the node's snapshots with its memory served. Without `push` its working
        set is left to demand. `spans` say when each part of this began and ended: resolve, and for
        one that was not open manifest, wake object, publish. Raises what `opening` raises.
        """
        repository, spans = self._repository(source), Spans()
        with spans.span("resolve"):
            digest, link, wake = opening.resolve(repository, reference, expect=expect)
        with self._turn(digest):
            known = self._opened.get(digest)
            if known is None:
                opened = opening.open_snapshot(
                    repository, digest, link, wake, self._pool, spans=spans
                )
                with spans.span("publish"):
                    known = self._serve(source, repository, opened, frozenset(here), push=push)
        return {
            "digest": digest,
            "files": {name: s.node.parts for name, s in known.files.items()},
            "spans": spans.ended(),
        }

    def prepare(self, source: Source) -> dict[str, Any]:
        """Connect to a store, so that the first wake from it need not. Raises StoreError."""
        for _ in self._repository(source).store.list("leases/"):
            pass
        return {}

    def go(self, digest: Digest) -> dict[str, Any]:
        """Push the working set: the client has opened the files."""
        pusher = self._get(digest).pusher
        if pusher is not None:
            pusher.go()
        return {}

    def wait_pushed(self, digest: Digest, timeout_s: float) -> dict[str, Any]:
        """Whether the push has ended."""
        pusher = self._get(digest).pusher
        return {"ended": pusher is None or pusher.wait(timeout_s)}

    def hydrate(self, digest: Digest, limit_bytes: int, limit_s: float) -> dict[str, Any]:
        """Begin to fetch the rest in the background."""
        opened = self._get(digest)
        if opened.hydration is None:
            files = [served.file for served in opened.files.values()]
            opened.hydration = Hydration(
                files, self._fetcher, limit_bytes=limit_bytes, limit_s=limit_s
            )
            opened.hydration.start()
        return {}

    def wait_hydrated(self, digest: Digest, timeout_s: float) -> dict[str, Any]:
        """Whether hydration has ended, and with everything here."""
        hydration = self._get(digest).hydration
        ended = hydration is None or hydration.wait(timeout_s)
        return {"ended": ended, "complete": hydration is not None and hydration.is_complete}

    def close(self, digest: Digest) -> dict[str, Any]:
        """Serve a snapshot no more; how many are open still."""
        with self._turn(digest):
            self._drop(digest)
        return {"open": len(self._opened)}

    def opened(self) -> dict[str, Any]:
        """What is open."""
        with self._lock:
            return {"digests": list(self._opened)}

    def failure(self, digest: Digest) -> dict[str, Any]:
        """Why a window of the snapshot could not be had, empty if none was missing."""
        opened = self._opened.get(digest)
        files = opened.files.items() if opened else ()
        found = [f"{name}: {s.file.failure}" for name, s in files if s.file.failure]
        return {"failure": "; ".join(found)}

    def counters(self) -> dict[str, Any]:
        """Everything that was counted since this process, `pid`, began.

        `store` is all that was asked of stores: for refs, records, wake objects and chunks.
        """
        with self._lock:
            opened = dict(self._opened)
        asked = self._requests.snapshot()
        return {
            "pid": os.getpid(),
            "store": {"requests": asked.total_requests, "bytes": asked.bytes_down},
            "snapshots": {digest: _count(one) for digest, one in opened.items()},
            "fetched": asdict(self._fetcher.counters()),
            "cache": asdict(self._cache.counters()) if self._cache else None,
            "peak_bytes": _peak_bytes(),
        }

    # a new pager goes on

    def recover(self) -> None:
        """Serve what the last pager served, before anything is answered."""
        for directory in self._registry.iterdir():
            if directory.name.startswith("."):
                shutil.rmtree(directory, ignore_errors=True)
                continue
            try:
                self._recover(directory)
            except (OSError, TorporError, msgspec.MsgspecError) as error:
                log.error("cannot go on with %s: %s", directory.name, error)
                shutil.rmtree(directory, ignore_errors=True)

    def _recover(self, directory: Path) -> None:
        entry = msgspec.msgpack.decode((directory / "entry").read_bytes(), type=_Entry)
        repository = self._repository(entry.source)
        encoded = (directory / "manifest").read_bytes()
        stored = repository.decode_snapshot(entry.digest, entry.link, encoded)
        self._protect(self._add(repository, stored, entry.images, directory))

    # inside

    def _serve(
        self,
        source: Source,
        repository: Repository,
        opened: OpenedSnapshot,
        here: frozenset[str],
        *,
        push: bool,
    ) -> _Opened:
        stored = opened.stored
        images = tuple(image for image in stored.images if image.digest not in here)
        directory = self._registry / stored.digest
        entry = _Entry(source, stored.digest, stored.link, images)
        _write_entry(directory, msgspec.msgpack.encode(entry), opened.manifest_object)
        try:
            made = self._add(repository, stored, images, directory)
            if push and opened.wake.working_set:
                self._start_push(repository, opened, made)
            memory = self._home / "pager" / "mount" / Path(*made.files["memory"].node.parts)
            opening.publish(repository, opened, self._snapshots, memory=memory)
        except BaseException:
            self._drop(stored.digest)
            raise
        self._pool.submit(self._protect, made)
        return made

    def _start_push(self, repository: Repository, opened: OpenedSnapshot, made: _Opened) -> None:
        """Keep at hand what came with the wake object's beginning, fetch the rest."""
        rest = []
        for segment in opened.wake.working_set:
            served = made.files.get(segment.file)
            content = opening.preloaded(opened, segment) if segment.file != "memory" else None
            if served is None:
                continue
            if content is None:
                rest.append(segment)
            else:
                served.file.preloaded.update(content)
        wake = WakeData(repository.store, opened.stored.wake, opened.wake.domain, tuple(rest))
        targets = {name: (s.file, s.node) for name, s in made.files.items()}
        kept = self._kept / opened.stored.wake.hash.hex()
        made.pusher = Pusher(wake, self._server, targets, kept=kept)
        made.pusher.start()

    def _protect(self, opened: _Opened) -> None:
        """Keep what a running instance maps from being evicted."""
        if self._cache is None:
            return
        protected = [entry.chunk_id for entry in opened.stored.memory]
        with self._lock:
            if self._opened.get(opened.stored.digest) is not opened:
                return  # closed meanwhile
            opened.protected = protected
        self._cache.protect(protected)

    def _drop(self, digest: Digest) -> None:
        with self._lock:
            opened = self._opened.pop(digest, None)
        if opened is not None:
            self._withdraw(opened)
        shutil.rmtree(self._registry / digest, ignore_errors=True)

    def _add(
        self,
        repository: Repository,
        stored: StoredSnapshot,
        images: tuple[ImageLink, ...],
        directory: Path,
    ) -> _Opened:
        memory = self._file(
            repository, stored.memory.size_bytes, _arrived(stored.memory), stored.domain
        )
        node = self._files.serve(("snapshots", stored.digest, "memory"), memory)
        files = {"memory": _Served(memory, node)}
        function = stored.manifest.function
        for image in images:
            name = "app" if function and image.digest == function.app else "image"
            files[name] = self._image(repository, stored.domain, image, directory)
        made = _Opened(stored, files)
        with self._lock:
            self._opened[stored.digest] = made
        return made

    def _image(
        self, repository: Repository, domain: Domain, image: ImageLink, directory: Path
    ) -> _Served:
        with self._lock:
            known = self._images.get(image.digest)
            if known is not None and not known.file.failure:
                known.users += 1
                return known
            arriving = submit(self._pool, lambda: _read_image(repository, image, directory))
            file = self._file(repository, image.size_bytes, arriving, domain)
            node = self._files.serve(("images", image.digest), file)
            served = self._images[image.digest] = _Served(file, node)
            return served

    def _file(
        self,
        repository: Repository,
        size_bytes: int,
        arriving: concurrent.futures.Future[FileMap],
        domain: Domain,
    ) -> StoredFile:
        return StoredFile(
            size_bytes, arriving, repository.store, domain, self._cache, self._fetcher
        )

    def _withdraw(self, opened: _Opened) -> None:
        for work in (opened.pusher, opened.hydration):
            if work is not None:
                work.stop()
        for name, served in opened.files.items():
            with self._lock:
                served.users -= 1
                if served.users:
                    continue
                if name != "memory":
                    self._images = {d: s for d, s in self._images.items() if s is not served}
                with contextlib.suppress(FileNotFoundError):
                    self._files.withdraw(served.node.parts)
            with contextlib.suppress(OSError):  # nobody ever looked it up
                self._server.invalidate(served.node)
        if self._cache is not None:
            self._cache.unprotect(opened.protected)

    def _get(self, digest: Digest) -> _Opened:
        with self._lock:
            opened = self._opened.get(digest)
        if opened is None:
            raise NotFound(f"snapshot {digest[:12]} is not open in the pager")
        return opened

    @contextlib.contextmanager
    def _turn(self, digest: Digest) -> Iterator[None]:
        with self._lock:
            lock = self._turns.setdefault(digest, threading.Lock())
        with lock:
            yield

    def _repository(self, source: Source) -> Repository:
        with self._lock:
            if source not in self._repositories:
                self._repositories[source] = open_repository(source, counters=self._requests)
            return self._repositories[source]


def _arrived(known: FileMap) -> concurrent.futures.Future[FileMap]:
    future: concurrent.futures.Future[FileMap] = concurrent.futures.Future()
    future.set_result(known)
    return future


def _read_image(repository: Repository, image: ImageLink, directory: Path) -> FileMap:
    """An image's map, from what an earlier pager kept or from the store, which is kept then."""
    kept = directory / f"image-{image.digest}"
    with contextlib.suppress(FileNotFoundError):
        return repository.decode_image(image.digest, image.record, kept.read_bytes()).content
    data = repository.read_linked(image.record, Kind.IMAGE)
    stored = repository.decode_image(image.digest, image.record, data)
    if stored.content.size_bytes != image.size_bytes:
        raise damaged(image.record.key, "its image has another length than its link says")
    with contextlib.suppress(OSError):  # closed meanwhile, or full: it is fetched again
        _write(kept, data)
    return stored.content


def _write_entry(directory: Path, entry: bytes, manifest: bytes) -> None:
    """Keep what a new pager needs to go on; it appears whole."""
    fresh = directory.with_name(f".{directory.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    _write(fresh / "entry", entry)
    _write(fresh / "manifest", manifest)
    shutil.rmtree(directory, ignore_errors=True)
    fresh.rename(directory)


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as stream:
        stream.write(data)
    fresh.rename(path)


def _count(opened: _Opened) -> dict[str, Any]:
    pusher, hydration = opened.pusher, opened.hydration
    return {
        "files": {name: asdict(served.file.counters) for name, served in opened.files.items()},
        "push": asdict(pusher.counters) if pusher else None,
        "hydrated_bytes": hydration.fetched_bytes if hydration else 0,
        "hydration": (
            {"began_s": hydration.began_s, "ended_s": hydration.ended_s} if hydration else None
        ),
    }


def _peak_bytes() -> int:
    """The most memory that this process ever had resident (VmHWM, proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
