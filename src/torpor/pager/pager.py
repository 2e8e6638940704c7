"""What a pager does for its node: opens snapshots, serves and pushes them, closes them again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor.errors import Damaged, NotFound, TorporError
from torpor.pager import opening
from torpor.pager.cache import open_or_none
from torpor.pager.fetcher import Fetcher
from torpor.pager.hydrating import Hydration
from torpor.pager.kept import KeptCopies
from torpor.pager.opened import Opened, Served, ServedImages, arrived
from torpor.pager.pushing import Pusher, Room, WakeData
from torpor.pager.registry import Entry, Registry
from torpor.pager.served import Content, StoredFile
from torpor.pager.source import open_source
from torpor.pager.spans import Spans
from torpor.snapshot.local import LocalSnapshots
from torpor.store.metrics import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torpor.host.fuse.files import Node
    from torpor.host.fuse.server import Server
    from torpor.pager.opening import OpenedSnapshot
    from torpor.pager.served import ServedFiles
    from torpor.pager.source import OpenSource, Source
    from torpor.snapshot.repository.filemap import FileMap
    from torpor.snapshot.repository.records import ImageLink
    from torpor.snapshot.repository.repository import StoredSnapshot
    from torpor.units import Digest

_FETCHERS: Final = 6
_RELEASE_S: Final = 1.0
_KEPT_SHARE: Final = 8  # of the bytes on disk one part in so many is for copies of working sets

log = logging.getLogger("torpor.pager")


@dataclass(frozen=True)
class Limits:
    """What a pager may use: cache bytes on disk, seconds that a window may take."""

    cache_bytes: int
    deadline_s: float


class Pager:
    """One node's pager. Any thread may call; opens of one snapshot wait for each other.

    `predecessor_died`: another pager of this home was killed a moment ago. `trace` is told of named
    places; see there.
    """

    def __init__(
        self,
        home: Path,
        server: Server,
        files: ServedFiles,
        limits: Limits,
        *,
        predecessor_died: bool = False,
        trace: Callable[[str], None] = lambda place: None,
    ) -> None:
        self._home = home
        self._server = server
        self._files = files
        self._limits = limits
        self._trace = trace
        self._snapshots = LocalSnapshots(home / "snapshots")
        self._registry = Registry(home / "pager" / "open")
        kept_bytes = limits.cache_bytes // _KEPT_SHARE
        self._kept = KeptCopies(home / "cache" / "wake", kept_bytes)
        with contextlib.suppress(OSError):
            self._kept.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cache = open_or_none(
            home / "cache" / "chunks",
            capacity_bytes=limits.cache_bytes - kept_bytes,
            predecessor_died=predecessor_died,
        )
        keep = self._cache.put if self._cache else lambda chunk_id, content: None
        self._fetcher = Fetcher(
            workers=_FETCHERS, deadline_s=limits.deadline_s, keep=keep, trace=trace
        )
        self._room = Room()
        self._pool = concurrent.futures.ThreadPoolExecutor(_FETCHERS, "open")
        self._lock = threading.Lock()
        self._turns: dict[Digest, threading.Lock] = {}
        self._opened: dict[Digest, Opened] = {}
        self._images = ServedImages(files, self._registry, self._pool, self._file)
        self._sources: dict[Source, OpenSource] = {}
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
        set is left to demand. One that is open already stays as it is, but what could not be had of
        it is asked for again. `spans` say when each part of this began and ended: resolve, and for
        one that was not open manifest, wake object, publish. Raises what `opening` raises.
        """
        opened_source, spans = self._source(source), Spans()
        repository = opened_source.repository
        self._trace("opening")
        with spans.span("resolve"):
            digest, link, wake = opening.resolve(repository, reference, expect=expect)
        with self._turn(digest):
            known = self._opened.get(digest)
            if known is None or not self._is_published(digest):
                opened = opening.open_snapshot(
                    repository, digest, link, wake, self._pool, spans=spans
                )
                self._trace("opened")
                images = tuple(i for i in opened.stored.images if i.digest not in here)
                entry = Entry(source, digest, opened.stored.link, images)
                with spans.span("publish"):
                    known = self._serve(entry, opened_source, opened, push=push)
            self._try_again(known)
        return {
            "digest": digest,
            "files": {name: s.node.parts for name, s in known.files.items()},
            "spans": spans.ended(),
        }

    def prepare(self, source: Source) -> dict[str, Any]:
        """Connect to a store, so that the first wake from it need not. Raises StoreError."""
        for _ in self._source(source).repository.store.list("leases/"):
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
        """Begin to fetch the rest in the background; again, if that ended early before."""
        opened = self._get(digest)
        with opened.lock:
            known = opened.hydration
            if known is None or (known.wait(0) and not known.is_complete):
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
        return {"failure": opened.failure if opened else ""}

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
            "snapshots": {digest: one.counters() for digest, one in opened.items()},
            "fetched": asdict(self._fetcher.counters()),
            "cache": asdict(self._cache.counters()) if self._cache else None,
            "peak_bytes": _peak_bytes(),
        }

    # a new pager goes on

    def recover(self) -> None:
        """Serve what the last pager served, before anything is answered. Asks no store."""
        for digest in self._registry.digests():
            try:
                entry, encoded = self._registry.read(digest)
                source = self._source(entry.source)
                stored = source.repository.decode_snapshot(digest, entry.link, encoded)
                self._add(source, stored, entry.images)
            except (OSError, TorporError, msgspec.MsgspecError) as error:
                log.error("cannot go on with %s: %s", digest, error)
                self._registry.remove(digest)
            self._trace("recovering")

    # inside

    def _is_published(self, digest: Digest) -> bool:
        """Whether the node has the snapshot: a pager may have died before it was complete."""
        return (self._snapshots.root / digest / "manifest.json").exists()

    def _serve(
        self, entry: Entry, source: OpenSource, opened: OpenedSnapshot, *, push: bool
    ) -> Opened:
        digest = entry.digest
        known = self._opened.get(digest)
        if known is None:
            self._registry.add(entry, opened.manifest_object)
            self._trace("registered")
        try:
            made = known or self._add(source, opened.stored, entry.images)
            if push and made.pusher is None and opened.wake.working_set:
                made.pusher = self._push(made, opened)
            memory = self._home / "pager" / "mount" / Path(*made.memory.node.parts)
            opening.publish(source.repository, opened, self._snapshots, memory=memory)
        except BaseException:
            if known is None:
                self._drop(digest)
            raise
        self._trace("published")
        return made

    def _push(self, made: Opened, opened: OpenedSnapshot) -> Pusher:
        """Push the working set; of disks keep at hand what came with the wake object's beginning.

        A VMM may read those before they are in the page cache. What is damaged the push finds too.
        """
        segments = opened.wake.working_set
        at_hand = []
        for segment in segments:
            if segment.file not in made.images:
                continue
            file = made.images[segment.file][1].file
            with contextlib.suppress(Damaged):
                arrival = opening.preloaded(opened, segment, size_bytes=file.size_bytes)
                if arrival is not None:
                    file.expected.add(arrival)
                    at_hand.append((file.expected, arrival))
        wake = WakeData(
            made.source.repository.store, opened.stored.wake, opened.wake.domain, segments
        )
        targets = {name: (served.file, served.node) for name, served in made.files.items()}
        pusher = Pusher(
            wake,
            self._server,
            targets,
            kept=self._kept,
            room=self._room,
            at_hand=at_hand,
            trace=self._trace,
        )
        pusher.start()
        return pusher

    def _add(
        self, source: OpenSource, stored: StoredSnapshot, images: tuple[ImageLink, ...]
    ) -> Opened:
        memory, disk = (
            self._serve_file(source, stored, name, content)
            for name, content in (("memory", stored.memory), ("disk", stored.disk))
        )
        function = stored.manifest.function
        served = {
            "app" if function and image.digest == function.app else "image": (
                image,
                self._images.serve(source, image),
            )
            for image in images
        }
        made = Opened(source, memory, disk, served)
        if self._cache is not None:
            self._cache.protect(stored.memory.packed_ids())
        with self._lock:
            self._opened[stored.digest] = made
        return made

    def _serve_file(
        self, source: OpenSource, stored: StoredSnapshot, name: str, content: FileMap
    ) -> Served:
        file = self._file(source, content.size_bytes, arrived(Content(content, stored.domain)))
        return Served(file, self._files.serve(("snapshots", stored.digest, name), file))

    def _file(
        self, source: OpenSource, size_bytes: int, arriving: concurrent.futures.Future[Content]
    ) -> StoredFile:
        return StoredFile(size_bytes, arriving, source.store, self._cache, self._fetcher)

    def _try_again(self, opened: Opened) -> None:
        for image, served in opened.images.values():
            served.file.try_again(partial(self._images.read, opened.source, image))
        for served in (opened.memory, opened.disk):
            served.file.try_again()

    def _drop(self, digest: Digest) -> None:
        with self._lock:
            opened = self._opened.pop(digest, None)
        self._registry.remove(digest)
        if opened is None:
            return
        works = [work for work in (opened.pusher, opened.hydration) if work is not None]
        for work in works:
            work.stop()
        nodes = [
            *(self._files.withdraw(served.node.parts) for served in (opened.memory, opened.disk)),
            *self._images.withdraw(opened.images.values()),
        ]
        if self._cache is not None:
            self._cache.unprotect(opened.memory.file.map.packed_ids())
        release = threading.Thread(
            target=self._release, args=(works, nodes), name="release", daemon=True
        )
        release.start()
        release.join(_RELEASE_S)

    def _release(self, works: list[Pusher | Hydration], nodes: list[Node]) -> None:
        """Free the page cache of files that are gone, once nothing is put there any more.

        It may take as long as a read that is not answered.
        """
        for work in works:
            work.wait()
        for node in nodes:
            with contextlib.suppress(OSError):  # nobody ever looked it up
                self._server.invalidate(node)

    def _get(self, digest: Digest) -> Opened:
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

    def _source(self, source: Source) -> OpenSource:
        with self._lock:
            if source not in self._sources:
                self._sources[source] = open_source(
                    source, deadline_s=self._limits.deadline_s, counters=self._requests
                )
            return self._sources[source]


def _peak_bytes() -> int:
    """The most memory that this process ever had resident (VmHWM, proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
