"""What a pager does for its node: opens snapshots, serves and pushes them, closes them again."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor.errors import Damaged, InternalError, NotFound, TorporError
from torpor.pager import opening
from torpor.pager.cache import open_or_none
from torpor.pager.fetcher import Fetcher
from torpor.pager.hydrating import Hydration
from torpor.pager.kept import KeptCopies
from torpor.pager.opened import Coming, Job, Opened, ServedImages, Shelf
from torpor.pager.pushing import Pusher, Room, WakeData
from torpor.pager.registry import Entry, Registry
from torpor.pager.served import Content
from torpor.pager.source import open_source
from torpor.pager.spans import Spans
from torpor.snapshot.local import LocalSnapshots
from torpor.snapshot.manifest import decode_outline, encode_manifest
from torpor.snapshot.repository.stored import Resolved
from torpor.store.metrics import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torpor.host.fuse.files import Node
    from torpor.host.fuse.server import Server
    from torpor.pager.opening import OpenedSnapshot
    from torpor.pager.served import ServedFiles
    from torpor.pager.source import OpenSource, Source
    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.repository.records import ImageLink
    from torpor.snapshot.repository.stored import StoredSnapshot
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
        self._pool = ThreadPoolExecutor(_FETCHERS, "open")
        self._lock = threading.Lock()
        self._turns: dict[Digest, threading.Lock] = {}
        self._coming: dict[Digest, Coming] = {}
        self._opened: dict[Digest, Opened] = {}
        self._shelf = Shelf(files, self._registry, self._cache, self._fetcher)
        self._images = ServedImages(self._shelf, self._pool)
        self._sources: dict[Source, OpenSource] = {}
        self._requests = Counters()

    # what clients ask

    def begin(
        self,
        reference: str,
        source: Source,
        *,
        expect: Digest | None,
        here: Sequence[str],
        push: bool,
        ref: bytes = b"",
    ) -> dict[str, Any]:
        """Begin to open a snapshot by ref or digest, for a VM that is started meanwhile.

        Answers when the ref has come: the snapshot's files are served then, and reads wait for what
        is still to come. `outline` is what the ref says of its manifest, as JSON. It is empty when
        the ref says nothing, for a digest, and for what is open already: then `complete` answers at
        once. The images in `here` are the node's own business; without `push` the working set is
        left to demand; `ref` is its ref's object if that was just read. One that is open stays
        as it is, but what could not be had of it is asked for again. Raises what `opening` raises.
        """
        opened_source, spans = self._source(source), Spans()
        self._trace("opening")
        with spans.span("resolve"):
            found = opened_source.repository.resolve(reference, expect=expect, ref=ref)
        digest, outline = found.digest, found.ref.outline if found.ref else None
        turn: threading.Lock | None = self._take_turn(digest)
        try:
            coming = self._coming[digest] = Coming(spans)
            known = self._opened.get(digest)
            if known is not None and self._is_published(digest):
                self._try_again(known)
                coming.ended.set_result(None)
                return self._begun(digest, known, None)
            job = Job(source, opened_source, found, frozenset(here), push)
            if known is not None or outline is None:
                self._fulfil(coming, job, known)
                coming.ended.set_result(None)
                return self._begun(digest, self._get(digest), None)
            assert found.ref is not None
            assert turn is not None
            images = job.lacking(found.ref.record)
            entry = Entry(source, digest, found.link, images, encode_manifest(outline))
            self._registry.add(entry, None)
            self._trace("registered")
            known = self._announce(opened_source, digest, outline, images)
            self._end_later(turn, coming, job, known)
            turn = None
            return self._begun(digest, known, outline)
        except BaseException:
            self._coming.pop(digest, None)
            raise
        finally:
            if turn is not None:
                turn.release()

    def complete(self, digest: Digest) -> dict[str, Any]:
        """Wait until a snapshot that was begun is among the node's; raises what keeps it from that.

        `spans` say when each part of the opening began and ended: resolve, and for one that was not
        open manifest, wake object, publish. One that this pager did not begin is not `known`.
        """
        coming = self._coming.get(digest)
        if coming is None:
            return {"known": False, "spans": []}
        coming.ended.result()
        return {"known": True, "spans": coming.spans.ended()}

    def prepare(self, source: Source) -> dict[str, Any]:
        """Connect to a store, so that the first wake from it need not. Raises StoreError."""
        for _ in self._source(source).repository.store.list("leases/"):
            pass
        return {}

    def go(self, digest: Digest) -> dict[str, Any]:
        """Push the working set, as soon as it is known: the client has opened the files."""
        self._get(digest).mapped.set()
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
        turn = self._take_turn(digest)
        try:
            self._coming.pop(digest, None)
            self._drop(digest)
        finally:
            turn.release()
        return {"open": len(self._opened)}

    def opened(self) -> dict[str, Any]:
        """What is open; not what is just being opened, which nobody can close before that ends."""
        coming = self._coming.copy()
        with self._lock:
            digests = list(self._opened)
        return {"digests": [d for d in digests if d not in coming or coming[d].ended.done()]}

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
        """Serve what the last pager served, before anything is answered. Asks no store for that.

        What it was just opening is opened in the background, and its working set not pushed.
        """
        for digest in self._registry.digests():
            try:
                entry, encoded = self._registry.read(digest)
                source = self._source(entry.source)
                if encoded is None:
                    outline = decode_outline(entry.outline, digest)
                    self._go_on_opening(source, entry, outline)
                    continue
                stored = source.repository.decode_snapshot(digest, entry.link, encoded)
                made = self._announce(source, digest, stored.manifest, entry.images)
                self._bring_maps(made, stored)
            except (OSError, TorporError, msgspec.MsgspecError) as error:
                log.error("cannot go on with %s: %s", digest, error)
                self._registry.remove(digest)
            self._trace("recovering")

    # inside

    def _is_published(self, digest: Digest) -> bool:
        """Whether the node has the snapshot: a pager may have died before it was complete."""
        return (self._snapshots.root / digest / "manifest.json").exists()

    def _begun(self, digest: Digest, opened: Opened, outline: Manifest | None) -> dict[str, Any]:
        return {
            "digest": digest,
            "files": {name: served.node.parts for name, served in opened.files.items()},
            "outline": "" if outline is None else encode_manifest(outline).decode(),
        }

    def _announce(
        self,
        source: OpenSource,
        digest: Digest,
        outline: Manifest,
        images: Sequence[ImageLink],
    ) -> Opened:
        """Serve a snapshot's files; where their windows lie may be known later."""
        memory, disk = (
            self._shelf.serve(source, ("snapshots", digest, name), part.size_bytes, Future())
            for name, part in (("memory", outline.memory), ("disk", outline.disk))
        )
        function = outline.function
        served = {
            "app" if function and image.digest == function.app else "image": (
                image,
                self._images.serve(source, image),
            )
            for image in images
        }
        made = Opened(source, memory, disk, served)
        with self._lock:
            self._opened[digest] = made
        return made

    def _bring_maps(self, made: Opened, stored: StoredSnapshot) -> None:
        made.memory.file.arriving.set_result(Content(stored.memory, stored.domain))
        made.disk.file.arriving.set_result(Content(stored.disk, stored.domain))
        if self._cache is not None:
            self._cache.protect(stored.memory.packed_ids())

    def _go_on_opening(self, source: OpenSource, entry: Entry, outline: Manifest) -> None:
        found = Resolved(entry.digest, entry.link)
        images = frozenset(image.digest for image in entry.images)
        wanted = [outline.image, *([outline.function.app] if outline.function else [])]
        here = frozenset(wanted) - images
        job = Job(entry.source, source, found, here, push=False, outline=outline)
        coming = self._coming[entry.digest] = Coming(Spans())
        known = self._announce(source, entry.digest, outline, entry.images)
        self._end_later(self._take_turn(entry.digest), coming, job, known)

    def _end_later(self, turn: threading.Lock, coming: Coming, job: Job, made: Opened) -> None:
        """Do the rest of an opening in a thread of its own, which frees the turn."""
        arguments = (turn, coming, job, made)
        threading.Thread(target=self._end, args=arguments, name="open", daemon=True).start()

    def _end(self, turn: threading.Lock, coming: Coming, job: Job, made: Opened) -> None:
        try:
            self._fulfil(coming, job, made)
        except TorporError as error:
            coming.ended.set_exception(error)
        except Exception as error:
            log.exception("opening failed")
            coming.ended.set_exception(InternalError("the pager failed", reason=repr(error)))
        else:
            coming.ended.set_result(None)
        finally:
            turn.release()

    def _fulfil(self, coming: Coming, job: Job, known: Opened | None) -> None:
        """Everything of an opening that asks for more than the ref; on failure nothing is open."""
        digest, repository = job.found.digest, job.opened_source.repository
        served_before = known is not None and known.memory.file.known_map is not None
        try:
            opened = opening.open_snapshot(repository, job.found, self._pool, spans=coming.spans)
            self._trace("opened")
            job.check(opened.stored)
            with coming.spans.span("publish"):
                made = known or self._register(job, opened)
                published = threading.Event()
                if job.push and made.pusher is None and opened.wake.working_set:
                    made.pusher = self._push(made, opened, after=published)
                if not served_before:
                    self._registry.add_manifest(digest, opened.manifest_object)
                memory = self._home / "pager" / "mount" / Path(*made.memory.node.parts)
                opening.publish(repository, opened, self._snapshots, memory=memory)
            published.set()  # the push has waited for it, as a VMM does
            if not served_before:
                self._bring_maps(made, opened.stored)
        except BaseException as error:
            if not served_before:
                failure = error if isinstance(error, TorporError) else None
                self._drop(digest, failure=failure)
            raise
        self._trace("published")

    def _register(self, job: Job, opened: OpenedSnapshot) -> Opened:
        """Serve a snapshot whose ref said nothing of its manifest."""
        stored, images = opened.stored, job.lacking(opened.stored)
        entry = Entry(job.source, stored.digest, stored.link, images)
        self._registry.add(entry, opened.manifest_object)
        self._trace("registered")
        return self._announce(job.opened_source, stored.digest, stored.manifest, images)

    def _push(self, made: Opened, opened: OpenedSnapshot, *, after: threading.Event) -> Pusher:
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
        return Pusher(
            wake,
            self._server,
            targets,
            kept=self._kept,
            room=self._room,
            after=after,
            mapped=made.mapped,
            beginning=opened.beginning,
            at_hand=at_hand,
            trace=self._trace,
        ).start()

    def _try_again(self, opened: Opened) -> None:
        for image, served in opened.images.values():
            served.file.try_again(partial(self._images.read, opened.source, image))
        for served in (opened.memory, opened.disk):
            served.file.try_again()

    def _drop(self, digest: Digest, *, failure: TorporError | None = None) -> None:
        """Serve a snapshot no more; `failure` is what kept its maps from coming."""
        with self._lock:
            opened = self._opened.pop(digest, None)
        self._registry.remove(digest)
        if opened is None:
            return
        failure = failure or NotFound(f"snapshot {digest[:12]} is served no more")
        for served in (opened.memory, opened.disk):
            served.file.give_up(failure)
        works = [work for work in (opened.pusher, opened.hydration) if work is not None]
        for work in works:
            work.stop()
        nodes = [
            *(self._files.withdraw(served.node.parts) for served in (opened.memory, opened.disk)),
            *self._images.withdraw(opened.images.values()),
        ]
        known = opened.memory.file.known_map
        if self._cache is not None and known is not None:
            self._cache.unprotect(known.packed_ids())
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

    def _take_turn(self, digest: Digest) -> threading.Lock:
        """Who opens or closes a snapshot holds its lock; another thread may free it."""
        with self._lock:
            turn = self._turns.setdefault(digest, threading.Lock())
        turn.acquire()
        return turn

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
