"""What a pager keeps on disk of what is open, so that its successor goes on without the store.

    DIR/snapshots/<digest>/entry      source and links
    DIR/snapshots/<digest>/manifest   the record's object; not there while that is still to come
    DIR/images/<digest>               an image's record, its object as it is in the store
    DIR/<served path>.failed          why a window of a file could not be had last, as UTF-8

Entries hold the secrets of a source: all is of mode 0600 in directories of mode 0700.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

import msgspec

from torpor.errors import NoSpace
from torpor.pager.source import Source
from torpor.snapshot.repository.records import ImageLink, Link
from torpor.structs import prepared
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Entry(msgspec.Struct, frozen=True):
    """An open snapshot: where it came from, and the images that are served with it.

    `outline` is what a ref said of its manifest, by which it is served until that comes.
    """

    source: Source
    digest: Digest
    link: Link
    images: tuple[ImageLink, ...]
    outline: bytes = b""


class Registry:
    """The open snapshots below a directory, which is made. Any thread, one process at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._snapshots = directory / "snapshots"
        self._images = directory / "images"
        for path in (self._snapshots, self._images):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, entry: Entry, manifest_object: bytes | None) -> None:
        """Keep an entry, with the manifest if that is here; it appears whole.

        Raises NoSpace, leaving nothing.
        """
        fresh = self._snapshots / f".{entry.digest}"
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir(mode=0o700)
            _write(fresh / "entry", msgspec.msgpack.encode(entry))
            if manifest_object is not None:
                _write(fresh / "manifest", manifest_object)
            shutil.rmtree(self._snapshots / entry.digest, ignore_errors=True)
            fresh.rename(self._snapshots / entry.digest)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise NoSpace(
                f"snapshot {entry.digest[:12]} could not be opened", reason=str(error)
            ) from None

    def remove(self, digest: Digest) -> None:
        """Forget an entry; one that is not there is fine."""
        shutil.rmtree(self._snapshots / digest, ignore_errors=True)

    def digests(self) -> Iterator[Digest]:
        """The snapshots that have an entry. What a dead process was writing is removed."""
        for directory in sorted(self._snapshots.iterdir()):
            if directory.name.startswith("."):
                shutil.rmtree(directory, ignore_errors=True)
            else:
                yield Digest(directory.name)

    def add_manifest(self, digest: Digest, manifest_object: bytes) -> None:
        """Keep the manifest of an entry, now that it is here. Raises NoSpace."""
        try:
            _write(self._snapshots / digest / "manifest", manifest_object)
        except OSError as error:
            raise NoSpace(
                f"snapshot {digest[:12]} could not be opened", reason=str(error)
            ) from None

    def read(self, digest: Digest) -> tuple[Entry, bytes | None]:
        """An entry, and the manifest's object if it had come. Raises OSError, MsgspecError."""
        directory = self._snapshots / digest
        entry = msgspec.msgpack.decode((directory / "entry").read_bytes(), type=prepared(Entry))
        with contextlib.suppress(FileNotFoundError):
            return entry, (directory / "manifest").read_bytes()
        return entry, None

    def image(self, digest: Digest) -> bytes | None:
        """An image's record as it was kept, None if it was not."""
        with contextlib.suppress(OSError):
            return (self._images / digest).read_bytes()
        return None

    def add_image(self, digest: Digest, data: bytes) -> None:
        """Keep an image's record, if the disk lets us: it can be fetched again."""
        with contextlib.suppress(OSError):
            _write(self._images / digest, data)

    def remove_image(self, digest: Digest) -> None:
        """Forget an image's record."""
        for path in (self._images / digest, self._failed("images", digest)):
            with contextlib.suppress(OSError):
                path.unlink()

    def failure(self, *served: str) -> str:
        """Why a window of a served file could not be had last, empty if none was missing."""
        with contextlib.suppress(OSError):
            return self._failed(*served).read_text("utf-8", "replace")
        return ""

    def note_failure(self, *served: str, failure: str) -> None:
        """Keep why a window of a served file could not be had, if the disk lets us."""
        with contextlib.suppress(OSError):
            _write(self._failed(*served), failure.encode())

    def _failed(self, *served: str) -> Path:
        path = self._directory.joinpath(*served)
        return path.with_name(f"{path.name}.failed")


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as stream:
        stream.write(data)
    fresh.rename(path)
