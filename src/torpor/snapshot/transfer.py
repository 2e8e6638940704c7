"""What all ways of moving snapshots have in common: progress and the report."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torpor.units import Digest


class Progress(Protocol):
    """Who is told how a transfer gets on; called from any thread."""

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """So much of `what` is done; `total_bytes` is None while it is not known."""


@dataclass
class TransferReport:
    """What moved: bytes by object (0 for one that was there already), and how long it took.

    `raw_bytes` is the content that was looked at: windows read, hashed, and compared; windows
    that were taken over from a parent unread are in `unread_bytes`.
    """

    digest: Digest
    objects: dict[str, int] = field(default_factory=dict)
    duration_s: float = 0.0
    raw_bytes: int = 0
    unread_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def moved_bytes(self) -> int:
        """Bytes that travelled."""
        return sum(self.objects.values())

    def moved(self, key: str, size_bytes: int) -> None:
        """Count bytes of an object; any thread."""
        with self._lock:
            self.objects[key] = self.objects.get(key, 0) + size_bytes
