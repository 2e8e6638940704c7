"""What is open in a pager: snapshots, and the images that several of them share."""

from __future__ import annotations

import concurrent.futures
import threading
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torpor.host.threads import submit
from torpor.pager.served import Content, StoredFile
from torpor.snapshot.manifest import outline_of
from torpor.snapshot.repository.records import Kind, damaged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torpor.host.fuse.files import Node
    from torpor.pager.cache import ChunkCache
    from torpor.pager.fetcher import Fetcher
    from torpor.pager.hydrating import Hydration
    from torpor.pager.pushing import Pusher
    from torpor.pager.registry import Registry
    from torpor.pager.served import ServedFiles
    from torpor.pager.source import OpenSource, Source
    from torpor.pager.spans import Spans
    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.repository.records import ImageLink, RefRecord
    from torpor.snapshot.repository.stored import Resolved, StoredSnapshot
    from torpor.units import Digest


@dataclass
class Served:
    """A file that is served, for how many snapshots."""

    file: StoredFile
    node: Node
    users: int = 1


@dataclass(frozen=True)
class Job:
    """An opening: what was asked for, and what its ref or digest was found to mean."""

    source: Source
    opened_source: OpenSource
    found: Resolved
    here: frozenset[str]
    push: bool
    outline: Manifest | None = None
    """What a pager before this one was told by a ref that is not asked again."""

    def lacking(self, record: RefRecord | StoredSnapshot) -> tuple[ImageLink, ...]:
        """The images of a snapshot that the node has not itself."""
        return tuple(image for image in record.images if image.digest not in self.here)

    def check(self, stored: StoredSnapshot) -> None:
        """Raise Damaged unless the record is that of the outline."""
        if self.outline is not None and self.outline != outline_of(stored.manifest):
            raise damaged(stored.link.key, "it is not what its ref says of it")


@dataclass(frozen=True)
class Coming:
    """An opening under way or over: `ended` has no result but the error that it failed with."""

    spans: Spans
    ended: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)


@dataclass
class Opened:
    """A snapshot that is open: memory, disk and, by the names that segments use, its images.

    Of its record only the maps stay: manifests of 64 snapshots are more than all their maps.
    """

    source: OpenSource
    memory: Served
    disk: Served
    images: dict[str, tuple[ImageLink, Served]]
    mapped: threading.Event = field(default_factory=threading.Event)
    """Set when somebody has opened the files: the kernel keeps pages for them from then on."""
    pusher: Pusher | None = None
    hydration: Hydration | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> dict[str, Served]:
        """What a VM maps of it, by name."""
        return {"memory": self.memory, **{name: s for name, (_, s) in self.images.items()}}

    @property
    def failure(self) -> str:
        """Why windows of it could not be had, empty if none was missing."""
        failures = {name: served.file.failure for name, served in self.files.items()}
        return "; ".join(f"{name}: {failure}" for name, failure in failures.items() if failure)

    def counters(self) -> dict[str, Any]:
        """What was counted for it."""
        pusher, hydration = self.pusher, self.hydration
        return {
            "files": {name: asdict(served.file.counters) for name, served in self.files.items()},
            "push": asdict(pusher.counters) if pusher else None,
            "hydrated_bytes": hydration.fetched_bytes if hydration else 0,
            "hydration": (
                {"began_s": hydration.began_s, "ended_s": hydration.ended_s} if hydration else None
            ),
        }


@dataclass(frozen=True)
class Shelf:
    """Makes the files that are served, and keeps what could not be had of them."""

    files: ServedFiles
    registry: Registry
    cache: ChunkCache | None
    fetcher: Fetcher

    def serve(
        self,
        source: OpenSource,
        path: Sequence[str],
        size_bytes: int,
        arriving: concurrent.futures.Future[Content],
    ) -> Served:
        """Let a file appear whose map arrives; what a pager before this one told of it is known."""
        file = StoredFile(
            size_bytes,
            arriving,
            source.store,
            self.cache,
            self.fetcher,
            failure=self.registry.failure(*path),
            note_failure=lambda failure: self.registry.note_failure(*path, failure=failure),
        )
        return Served(file, self.files.serve(path, file))


class ServedImages:
    """The images that are served, each once however many snapshots have it. Any thread."""

    def __init__(self, shelf: Shelf, pool: concurrent.futures.ThreadPoolExecutor) -> None:
        self._shelf = shelf
        self._registry = shelf.registry
        self._pool = pool
        self._lock = threading.Lock()
        self._served: dict[Digest, Served] = {}

    def serve(self, source: OpenSource, image: ImageLink) -> Served:
        """Serve an image for one snapshot more; its record arrives in the background."""
        with self._lock:
            known = self._served.get(image.digest)
            if known is not None:
                known.users += 1
                return known
            served = self._served[image.digest] = self._shelf.serve(
                source, ("images", image.digest), image.size_bytes, self.read(source, image)
            )
            return served

    def withdraw(self, images: Iterable[tuple[ImageLink, Served]]) -> Iterator[Node]:
        """Serve images for one snapshot less; the nodes of those that nobody has any more."""
        for image, served in images:
            with self._lock:
                served.users -= 1
                if served.users:
                    continue
                del self._served[image.digest]
                self._registry.remove_image(image.digest)
                self._shelf.files.withdraw(served.node.parts)
            yield served.node

    def read(self, source: OpenSource, image: ImageLink) -> concurrent.futures.Future[Content]:
        """An image's map, from what an earlier pager kept or from the store, which is kept then."""

        def read() -> Content:
            kept = self._registry.image(image.digest)
            data = kept or source.repository.read_linked(image.record, Kind.IMAGE)
            stored = source.repository.decode_image(image.digest, image.record, data)
            if stored.content.size_bytes != image.size_bytes:
                raise damaged(image.record.key, "its image has another length than its link says")
            if kept is None:
                self._registry.add_image(image.digest, data)
            return Content(stored.content, stored.domain)

        return submit(self._pool, read)
