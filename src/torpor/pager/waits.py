"""Who waits for which window: what a VM hangs on, told while it still hangs."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from torpor.pager.served import ServedFiles
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.host.fuse.files import Call, Data, Node
    from torpor.pager.registry import Registry
    from torpor.units import Digest

_LONG_S: Final = 2.0


class WatchedFiles(ServedFiles):
    """Served files that know which of their reads are under way. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._reads: dict[int, tuple[tuple[str, ...], int, float]] = {}

    def read(self, node: Node, offset: int, length: int, call: Call, /) -> Data:
        """See Files."""
        reader = threading.get_ident()
        self._reads[reader] = (node.parts, offset, time.monotonic())
        try:
            return super().read(node, offset, length, call)
        finally:
            del self._reads[reader]

    def waiting(self) -> Iterator[tuple[tuple[str, ...], int, float]]:
        """Path, offset in bytes and age in seconds of each read under way, oldest first."""
        now_s = time.monotonic()
        for parts, offset, began_s in sorted(self._reads.copy().values(), key=lambda read: read[2]):
            yield parts, offset, now_s - began_s


@dataclass(frozen=True)
class Waits:
    """Tells what the readers of an open snapshot wait for."""

    files: WatchedFiles
    registry: Registry

    def longest(self, digest: Digest) -> str:
        """The first window of the oldest read of a snapshot's files; empty if none is long."""
        names = self._names(digest)
        for parts, offset, age_s in self.files.waiting():
            if age_s >= _LONG_S and parts in names:
                window = offset // WINDOW_BYTES
                return f"{names[parts]}: window {window}, asked for {age_s:.0f} s ago"
        return ""

    def _names(self, digest: Digest) -> dict[tuple[str, ...], str]:
        try:
            entry, _ = self.registry.read(digest)
        except (OSError, msgspec.MsgspecError):  # it was closed
            return {}
        names: dict[tuple[str, ...], str] = {("snapshots", digest, "memory"): "memory"}
        for image in entry.images:
            names["images", image.digest] = f"image {image.digest[:12]}"
        return names
