"""Snapshots between a node and its store or an archive: what moves."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from torpor.errors import Damaged, InvalidInput, NotFound, ObjectMissing
from torpor.node.keyring import find_keyring, importing_keyring, open_keyring
from torpor.node.tables import ANYTHING
from torpor.snapshot import whole
from torpor.snapshot.repository.archive import ArchiveReader, ArchiveWriter, damaged_archive
from torpor.snapshot.repository.archive_files import existing_file, new_file, pipe, spooled
from torpor.snapshot.repository.describing import key_name
from torpor.snapshot.repository.pulling import Here, pull
from torpor.snapshot.repository.pushing import PushOptions, push
from torpor.snapshot.repository.repository import Repository
from torpor.store.stack import open_store
from torpor.units import parse_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torpor.node.catalogue import Catalogue, NamedSnapshot
    from torpor.node.paging import Coming, Paging
    from torpor.node.parts import Parts
    from torpor.node.timeline import Timeline
    from torpor.snapshot.local import LocalSnapshot
    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.transfer import TransferReport
    from torpor.units import Digest

PIPE = Path("-")
"""The archive that stands for standard output or input."""


@dataclass(frozen=True)
class Exported:
    """An archive that was written: its length, the ref in it, and the key that opens it.

    `key_id` is empty for one that is not sealed.
    """

    digest: Digest
    name: str
    size_bytes: int
    key_id: str


@dataclass(frozen=True)
class Imported:
    """A snapshot that came from an archive, and the name that points to it here."""

    snapshot: NamedSnapshot
    name: str
    report: TransferReport


class Exchange:
    """Push and pull, export and import of one node. Blocking; any thread.

    What arrives gets its name here while nobody may collect what has none.
    """

    def __init__(self, parts: Parts, catalogue: Catalogue, paging: Paging) -> None:
        self._parts = parts
        self._catalogue = catalogue
        self._paging = paging

    def repository(self, *, ask_s: float | None = None) -> Repository:
        """The repository of this node's store. Raises InvalidInput without a key for it.

        With `ask_s` a request ends after that and is not repeated.
        """
        settings = self._parts.settings
        if ask_s is not None:
            limit_s = min(ask_s, settings.store_timeout_s)
            settings = replace(settings, store_timeout_s=limit_s, store_retry_s=0.0)
        store = open_store(settings, counters=self._parts.store_counters)
        return Repository(store, open_keyring(settings, self._parts.reporter))

    def sealed_with(self) -> str:
        """The id of the key that seals what is pushed from here, empty if nothing does."""
        settings = self._parts.settings
        if settings.transfer == "whole":
            return ""
        return key_name(open_keyring(settings, self._parts.reporter).current)

    def push(
        self, reference: str, *, name: str | None = None, known: str = ANYTHING
    ) -> TransferReport:
        """Send a snapshot and point a name in the store to it, its own unless `name` is given.

        `known` is what the name must mean there before, see `node.tables`. Raises NotFound,
        InvalidInput without a name or key, Conflict, StoreError.
        """
        settings, progress = self._parts.settings, self._parts.reporter
        with self._paging.closing(), self._parts.files_lock(), contextlib.ExitStack() as stack:
            named = self._catalogue.get(reference)
            stack.enter_context(self._paging.readable(named.snapshot))
            snapshot, images = named.snapshot, self._images_of(named.snapshot)
            ref = self._catalogue.name_to_send(named, reference, name)
            match settings.transfer:
                case "whole":
                    store = open_store(settings)
                    return whole.push(store, snapshot, ref=ref, images=images, progress=progress)
                case "repository":
                    return push(
                        self.repository(),
                        snapshot,
                        ref=ref,
                        images=images,
                        base=self._base_of(snapshot),
                        progress=progress,
                        options=PushOptions(level=settings.zstd_level),
                        known=None if known == ANYTHING else known,
                    )
                case other:
                    assert_never(other)

    def pull(
        self, reference: str, *, expect: Digest | None = None
    ) -> tuple[NamedSnapshot, TransferReport]:
        """Fetch a snapshot by ref or digest, which becomes its name here; with `expect`, only that.

        One that was fetched by its digest stays without a name, until it is removed. Raises
        NotFound, Conflict, Damaged, KeyMissing, Incompatible, StoreError, NoSpace.
        """
        with self._parts.files_lock():
            digest, manifest, report = self._fetch(reference, expect)
            return self._keep(reference, digest, manifest), report

    def begin(
        self,
        reference: str,
        *,
        expect: Digest | None = None,
        timeline: Timeline | None = None,
        ref: bytes = b"",
    ) -> Coming:
        """Have the pager open a snapshot of the store, which becomes its name here as in `pull`.

        The caller holds the files lock shared until it is complete. `timeline` and `ref` as in
        `Paging.begin`.
        """
        coming = self._paging.begin(reference, expect=expect, timeline=timeline, ref=ref)

        def complete() -> LocalSnapshot:
            snapshot = coming.complete()
            return self._keep(reference, snapshot.digest, snapshot.manifest).snapshot

        return replace(coming, complete=complete)

    def complete(self, digest: Digest) -> LocalSnapshot:
        """Fetch a snapshot whole that this node has but for its memory; its names stay as they are.

        The caller holds the files lock shared. Raises as `pull` does.
        """
        self._fetch(digest, None)
        return self._catalogue.get(digest).snapshot

    def verify(self, reference: str) -> NamedSnapshot:
        """Read every byte of a snapshot on this node, what a pager serves of it too.

        Raises Damaged naming the file.
        """
        with self._paging.closing(), self._parts.files_lock(), contextlib.ExitStack() as stack:
            named = self._catalogue.get(reference)
            stack.enter_context(self._paging.readable(named.snapshot))
            self._parts.snapshots.verify(named.snapshot.digest)
        return named

    def export(self, reference: str, target: Path, *, name: str | None = None) -> Exported:
        """Write a snapshot with its images to an archive under a name; PIPE is standard output.

        The file appears whole or not at all. Raises NotFound, InvalidInput without a key or the
        decision for plain, or for a target that cannot be written; NoSpace.
        """
        settings = self._parts.settings
        if find_keyring(settings) is None and not settings.plain:
            raise InvalidInput(
                "there is no key for the archive",
                reason="it holds a function's memory: whoever reads the file could read it",
                hint="`torpor key init` makes a key (copy it to where you import), or choose"
                " --plain",
            )
        keyring = open_keyring(settings, self._parts.reporter)
        with self._paging.closing(), self._parts.files_lock(), contextlib.ExitStack() as stack:
            named = self._catalogue.get(reference)
            stack.enter_context(self._paging.readable(named.snapshot))
            ref = self._catalogue.name_to_send(named, reference, name)
            images = self._images_of(named.snapshot)
            with _opened_for_writing(target) as write:
                writer = ArchiveWriter(write)
                push(
                    Repository(writer, keyring),
                    named.snapshot,
                    ref=ref,
                    images=images,
                    base=None,
                    progress=self._parts.reporter,
                    options=PushOptions(level=settings.zstd_level),
                )
                size_bytes = writer.finish()
        return Exported(named.snapshot.digest, ref, size_bytes, key_name(keyring.current))

    def import_archive(
        self, source: Path, *, name: str | None = None, expect: Digest | None = None
    ) -> Imported:
        """Take over the snapshot of an archive with the images that this node lacks.

        It gets the archive's name unless `name` is given. Nothing of it is believed before it was
        verified, nothing is left when it is refused. Raises NotFound, Damaged naming the archive,
        KeyMissing, Conflict, Incompatible, NoSpace.
        """
        label = "standard input" if source == PIPE else str(source)
        wanted = None if name is None else parse_name(name, what="snapshot name")
        keyring = importing_keyring(self._parts.settings)
        with self._parts.files_lock(), self._opened_for_reading(source) as descriptor:
            repository = Repository(ArchiveReader(descriptor, label), keyring)
            names = repository.refs()
            if len(names) != 1:
                raise damaged_archive(label, f"it has {len(names)} refs, not one")
            try:
                digest, manifest, report = self._pull(repository, names[0], expect)
            except (Damaged, ObjectMissing) as error:
                raise damaged_archive(label, str(error)) from None
            ref = wanted or names[0]
            return Imported(self._keep(ref, digest, manifest), ref, report)

    def _keep(self, reference: str, digest: Digest, manifest: Manifest) -> NamedSnapshot:
        """Give what arrived its name; a digest as name keeps what has no other."""
        if manifest.kind != "base":
            self._parts.journal.set_ref(reference, digest)
        return self._catalogue.get(digest)

    def _fetch(
        self, reference: str, expect: Digest | None
    ) -> tuple[Digest, Manifest, TransferReport]:
        settings, parts = self._parts.settings, self._parts
        match settings.transfer:
            case "whole":
                if expect is not None:
                    raise InvalidInput("whole files are pulled without an expected digest")
                return whole.pull(
                    open_store(settings),
                    reference,
                    snapshots=parts.snapshots,
                    adopt_image=parts.images.adopt,
                    has_image=parts.images.has,
                    progress=parts.reporter,
                )
            case "repository":
                return self._pull(self.repository(), reference, expect)
            case other:
                assert_never(other)

    def _pull(
        self, repository: Repository, reference: str, expect: Digest | None
    ) -> tuple[Digest, Manifest, TransferReport]:
        parts = self._parts
        here = Here(parts.snapshots, parts.images.has, parts.images.adopt)
        return pull(repository, reference, here=here, progress=parts.reporter, expect=expect)

    @contextlib.contextmanager
    def _opened_for_reading(self, source: Path) -> Iterator[int]:
        if source == PIPE:
            with spooled(sys.stdin.fileno(), self._parts.settings.home) as descriptor:
                yield descriptor
        else:
            with existing_file(source) as descriptor:
                yield descriptor

    def _images_of(self, snapshot: LocalSnapshot) -> Mapping[Digest, Path]:
        manifest = snapshot.manifest
        digests = [manifest.image, *([manifest.function.app] if manifest.function else [])]
        return {digest: self._paging.image_path(digest) for digest in digests}

    def _base_of(self, snapshot: LocalSnapshot) -> LocalSnapshot | None:
        """The base that a snapshot descends from, as far as this node has the line."""
        current = snapshot
        while current.manifest.kind != "base":
            if current.manifest.parent is None:
                return None
            try:
                current = self._parts.snapshots.get(current.manifest.parent)
            except NotFound:
                return None
        return current


def _opened_for_writing(
    target: Path,
) -> contextlib.AbstractContextManager[Callable[[bytes], None]]:
    if target == PIPE:
        return pipe(sys.stdout.fileno(), "standard output")
    return new_file(target)
