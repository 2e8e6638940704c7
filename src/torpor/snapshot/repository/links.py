"""Links: what a record may say of the objects that it points to (docs/format.md, "Links")."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from torpor.errors import InvalidInput
from torpor.snapshot.repository.filemap import LARGEST_WAKE_BYTES
from torpor.snapshot.repository.records import LIMITS, Kind, damaged
from torpor.units import parse_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torpor.snapshot.manifest import Manifest
    from torpor.snapshot.repository.records import (
        ImageLink,
        Link,
        RefRecord,
        SnapshotRecord,
        WakeLink,
    )

_OVERHEAD_BYTES: Final = 1024
"""More than a record's header, salt, tag and encoding byte."""

_ID: Final = "[0-9a-f]{32}"
_KEYS: Final = {
    Kind.MANIFEST: re.compile(f"snapshots/{_ID}/{_ID}/manifest"),
    Kind.WAKE: re.compile(f"snapshots/{_ID}/{_ID}/wake"),
    Kind.IMAGE: re.compile(f"images/{_ID}/{_ID}"),
}
"""The names that a link to an object of a kind may have."""


def longest_object(kind: Kind) -> int:
    """Bytes that the object of a record may have."""
    return LIMITS[kind] + _OVERHEAD_BYTES


def check_ref(key: str, record: RefRecord) -> None:
    """Raise Damaged, naming the ref's object, unless what it points to can be."""
    _check_digest(key, record.snapshot)
    _check_link(key, Kind.MANIFEST, record.manifest)
    _check_wake(key, record.wake)
    _check_images(key, record.images)


def check_snapshot(key: str, record: SnapshotRecord) -> None:
    """Raise Damaged, naming the record's object, unless all that it points to can be."""
    _check_wake(key, record.wake)
    _check_images(key, record.images)
    if record.base is not None:
        _check_digest(key, record.base.digest)
        _check_link(key, Kind.MANIFEST, record.base.manifest)


def check_images(key: str, manifest: Manifest, images: Sequence[ImageLink]) -> None:
    """Raise Damaged, naming the object, unless the images are those of the manifest."""
    wanted = [manifest.image, *([manifest.function.app] if manifest.function else [])]
    if sorted(wanted) != sorted(image.digest for image in images):
        raise damaged(key, "its images are not the manifest's")


def _check_images(key: str, images: Iterable[ImageLink]) -> None:
    for image in images:
        _check_digest(key, image.digest)
        _check_link(key, Kind.IMAGE, image.record)


def _check_digest(key: str, digest: str) -> None:
    try:
        parse_digest(digest)
    except InvalidInput as error:
        raise damaged(key, str(error)) from None


def _check_key(key: str, kind: Kind, linked: str) -> None:
    if _KEYS[kind].fullmatch(linked) is None:
        raise damaged(key, f"a link to {linked[:80]!r}")


def _check_link(key: str, kind: Kind, link: Link) -> None:
    _check_key(key, kind, link.key)
    if not 0 < link.size_bytes <= longest_object(kind):
        raise damaged(key, f"a link to an object of {link.size_bytes} bytes")


def _check_wake(key: str, wake: WakeLink) -> None:
    _check_key(key, Kind.WAKE, wake.key)
    if not 0 < wake.header_bytes <= min(wake.size_bytes, longest_object(Kind.WAKE)):
        raise damaged(key, f"a wake header of {wake.header_bytes} bytes")
    if wake.size_bytes > LARGEST_WAKE_BYTES:
        raise damaged(key, f"a wake object of {wake.size_bytes} bytes")
