"""Snapshots whose memory and images a pager serves: opened for a wake, closed when none needs them.

A node's pager is started by the first command that needs it and ended by the last instance that
did. Whether an instance needs a snapshot is told by the journal; whoever closes holds the files
lock alone, so that nobody is just opening what is closed.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from torpor.errors import Conflict, DeadlineExceeded, StoreUnreachable, TorporError
from torpor.host.cancel import uncancelled
from torpor.host.sparse import copy_sparse
from torpor.node.keyring import keyring_text
from torpor.node.parts import log
from torpor.node.timeline import Timeline
from torpor.pager import trial
from torpor.pager.client import PagerClient
from torpor.pager.control import PagerGone
from torpor.pager.source import Source
from torpor.snapshot.local import LocalSnapshot, parse_unique, unique_name
from torpor.snapshot.manifest import decode_outline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torpor.node.journal_rows import InstanceRow
    from torpor.node.parts import Parts
    from torpor.units import Digest

E = TypeVar("E", bound=TorporError)

_CLOSE_WAIT_S: Final = 2.0
_NOTE: Final = "served-memory"


@dataclass(frozen=True)
class Files:
    """What a VM is restored from: the files that are its memory and its read-only disks.

    `paged`: they come from a pager or a trial, window by window.
    """

    memory: Path
    image: Path
    app: Path | None
    paged: bool


@dataclass(frozen=True)
class Coming:
    """A snapshot that may be on its way to this node.

    Of its manifest the outline is here, of its files the pager's: memory and images. `complete`,
    blocking, waits for the rest and returns the snapshot as it is then; it raises what a pull does.
    """

    snapshot: LocalSnapshot
    complete: Callable[[], LocalSnapshot]

    @classmethod
    def of(cls, snapshot: LocalSnapshot) -> Coming:
        """One of which nothing is missing."""
        return cls(snapshot, lambda: snapshot)


class Paging:
    """The pager of one node. Blocking; any thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.client = PagerClient(parts.settings)
        self.pushes = True
        """Whether working sets are pushed; without, all comes on demand (for comparison)."""

    @property
    def trials_dir(self) -> Path:
        """Where trials have their mount points."""
        return self._parts.settings.home / "trials"

    @contextlib.contextmanager
    def trial(self, snapshot: LocalSnapshot) -> Iterator[tuple[trial.Trial, Files]]:
        """Serve a snapshot's files from a cold mount that tells what is touched. Blocking.

        No VM may run on them any more when the body ends. Raises HostUnfit without FUSE.
        """
        own = self.files_of(snapshot, None)
        paths = {"memory": own.memory, "image": own.image}
        paths |= {} if own.app is None else {"app": own.app}
        self.trials_dir.mkdir(exist_ok=True, mode=0o700)
        with trial.serve_trial(self.trials_dir / unique_name(), paths) as served:
            at = served.paths
            yield served, Files(at["memory"], at["image"], at.get("app"), paged=True)

    def open(self, reference: str) -> LocalSnapshot:
        """Open a snapshot of the store by ref or digest; it then is among this node's.

        The caller holds the files lock shared. Raises what a pull raises, and HostUnfit.
        """
        return self.begin(reference).complete()

    def begin(
        self,
        reference: str,
        *,
        expect: Digest | None = None,
        timeline: Timeline | None = None,
        ref: bytes = b"",
    ) -> Coming:
        """Begin to open a snapshot: what its ref says is enough to start a VM from its files.

        `ref` is that ref's object, if it was just read.
        `timeline` gets the pager's start and what it did as parts of its step `open`. The caller
        holds the files lock shared until it is complete. Raises what a pull raises, and HostUnfit.
        """
        source, timeline = self._source(), timeline or Timeline()
        here = [info.digest for info in self._parts.images.list()]
        began_s = time.monotonic()
        self.client.ensure()
        timeline.add_part("pager start", began_s, time.monotonic(), of="open")
        begun = self.client.begin(
            reference, source, expect=expect, here=here, push=self.pushes, ref=ref
        )

        def complete() -> LocalSnapshot:
            spans = self.client.complete(begun.digest)
            if spans is None:  # the pager died; its VM's files are there again with the new one's
                spans = self.client.open(
                    reference, source, expect=begun.digest, here=here, push=self.pushes
                ).spans
            for name, begin_s, end_s in spans:
                timeline.add_part(name, begin_s, end_s, of="open")
            return self._parts.snapshots.get(begun.digest)

        if not begun.outline:
            return Coming.of(complete())
        return Coming(
            LocalSnapshot(
                begun.digest,
                decode_outline(begun.outline, begun.digest),
                self._parts.snapshots.root / begun.digest,
                served=begun.files["memory"],
            ),
            complete,
        )

    def prepare(self) -> None:
        """Start the pager and let it connect to the store before anything is to be woken."""
        self.client.prepare(self._source())

    def _source(self) -> Source:
        settings = self._parts.settings
        return Source.of(settings, keyring_text(settings, self._parts.reporter))

    def files_of(self, snapshot: LocalSnapshot, app: Path | None) -> Files:
        """The files of a snapshot: this node's own where it has them, else the pager's.

        `app` is the one to attach to a base; every other snapshot names its own.
        """
        manifest = snapshot.manifest
        image = self.image_path(manifest.image)
        if manifest.function is not None:
            app = self.image_path(manifest.function.app)
        return Files(snapshot.memory, image, app, paged=snapshot.served is not None)

    def files_of_instance(self, directory: Path, snapshot: LocalSnapshot) -> Files:
        """The files that a running instance was made from.

        Its memory may be the pager's although the snapshot is complete here by now.
        """
        files = self.files_of(snapshot, directory / "app")
        try:
            _, memory = _read_note(directory)
        except FileNotFoundError:
            return files
        return replace(files, memory=memory, paged=True)

    def has_image(self, digest: Digest) -> bool:
        """Whether an image can be used: it is here, or the pager serves it."""
        return self._parts.images.has(digest) or self.client.image_path(digest).exists()

    def image_path(self, digest: Digest) -> Path:
        """Where an image is. Raises NotFound."""
        if self._parts.images.has(digest):
            return self._parts.images.path(digest)
        served = self.client.image_path(digest)
        return served if served.exists() else self._parts.images.path(digest)

    def keep_images(self, snapshot: LocalSnapshot) -> None:
        """Have the images of a snapshot on this node that the pager serves, for when it ends.

        Raises NotFound when it does not serve them, NoSpace.
        """
        function = snapshot.manifest.function
        for digest in (snapshot.manifest.image, *([function.app] if function else [])):
            if self._parts.images.has(digest):
                continue
            with self._parts.snapshots.stage() as staging:
                copy = staging.directory / "image"
                copy_sparse(self.image_path(digest), copy)
                self._parts.images.adopt(copy, digest)

    @contextlib.contextmanager
    def pushed(self, snapshot: LocalSnapshot, files: Files) -> Iterator[None]:
        """Have the working set pushed while the body brings the VM up.

        The files stay open for the body: the kernel keeps pages only of files that somebody knows.
        """
        if snapshot.served is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            for path in {files.memory, files.image, files.app} - {None}:
                assert path is not None
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
            self.client.go(snapshot.digest)
            yield

    def hydrate(self, snapshot: LocalSnapshot) -> None:
        """Begin to fetch the rest of a woken snapshot, as far as the settings allow."""
        settings = self._parts.settings
        if snapshot.served is not None and settings.hydrate_bytes:
            self.client.hydrate(
                snapshot.digest,
                limit_bytes=settings.hydrate_bytes,
                limit_s=settings.hydrate_s,
            )

    def explain(self, error: E, snapshot: LocalSnapshot) -> E:
        """What became of a VM, with the window as reason that it could not have, if that was it.

        For DeadlineExceeded that may be a window which it still waits for. Starts no pager.
        """
        if snapshot.served is None:
            return error
        failure = self.client.failure(snapshot.digest)
        reason = f"a window could not be had: {failure}" if failure else ""
        if not failure and isinstance(error, DeadlineExceeded):
            waiting = self.client.waiting(snapshot.digest)
            reason = f"a window has not come yet: {waiting}" if waiting else ""
        if not reason:
            return error
        hint = "check that the store answers, then wake it again"
        return type(error)(error.message, reason=reason, hint=hint)

    def note_files(self, directory: Path, files: Files) -> None:
        """Write down in an instance's directory which mount and file its VM is about to map."""
        if files.paged and files.memory.is_relative_to(self.client.mount):
            device = files.memory.stat().st_dev
            note = f"{os.major(device)}:{os.minor(device)} {files.memory}"
            (directory / _NOTE).write_text(note)

    def has_lost_memory(self, row: InstanceRow) -> bool:
        """Whether an instance's VM maps a mount that serves no more: it ends at its next miss.

        A mount's number belongs to nobody else as long as somebody maps a file of it.
        """
        try:
            mount, _ = _read_note(self._parts.instances_dir / row.id)
        except FileNotFoundError:  # all that it has is on this node
            return False
        return mount != self.client.mounted()

    @contextlib.contextmanager
    def copied(self, snapshot: LocalSnapshot | None) -> Iterator[None]:
        """For a body that copies what the pager serves of a snapshot, fetching what is missing.

        What could not be had before is asked for again. Raises StoreUnreachable, naming the window,
        when one cannot be had.
        """
        if snapshot is None or snapshot.served is None:
            yield
            return
        if self.client.failure(snapshot.digest):
            self.open(snapshot.digest)
        try:
            yield
        except OSError as error:
            raise StoreUnreachable(
                f"what is missing of snapshot {snapshot.digest[:12]} on this node did not come",
                reason=self.client.failure(snapshot.digest) or str(error),
                hint="check that the store answers, then do it again",
            ) from None

    @contextlib.contextmanager
    def readable(self, snapshot: LocalSnapshot) -> Iterator[None]:
        """Have a snapshot's memory open for the body, whoever else needs it.

        The caller holds the files lock shared. Raises as `open` and `copied` do.
        """
        if snapshot.served is not None:
            self.open(snapshot.digest)
        with self.copied(snapshot):
            yield

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close what no instance needs when the body is over; it may not hold the files lock."""
        try:
            yield
        finally:
            with uncancelled():
                self.close_unneeded()

    def close_unneeded(self) -> None:
        """Close what no instance needs, and end the pager when nothing is open any more.

        Skipped while others are at work with snapshots; the last of them does it.
        """
        if not self.client.is_running():
            return
        with (
            contextlib.suppress(Conflict, PagerGone),
            self._parts.files_lock(alone=True, wait_s=_CLOSE_WAIT_S),
        ):
            needed = {row.snapshot for row in self._parts.journal.instances()}
            opened = set(self.client.opened())
            for digest in opened - needed:
                self.client.close(digest)
            if not opened & needed and not self._parts.settings.pager_stays:
                self.client.stop()

    def clear_dead(self) -> None:
        """Remove a mount that nobody serves any more, and all else of dead keepers and pagers.

        Which instances have lost their memory can be told after that.
        """
        self.client.reconcile()

    def reconcile(self) -> None:
        """Remove what killed trials left, close what no instance needs."""
        self.close_unneeded()
        for mount_point in self.trials_dir.glob("*"):
            maker = parse_unique(mount_point.name)
            if maker is None or not maker.is_alive():
                log.warning("removing a trial that was cut off path=%s", mount_point)
                trial.sweep(mount_point)


def _read_note(directory: Path) -> tuple[str, Path]:
    """The mount (major:minor) and the file in it that an instance's VM maps."""
    mount, _, memory = (directory / _NOTE).read_text().partition(" ")
    return mount, Path(memory)
