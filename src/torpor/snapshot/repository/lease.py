"""Leases: how pushes and collections say that they are under way (docs/format.md, "Collection").

A lease is an object that its holder writes again every BEAT_S. By the store's own clock it is dead
LEASE_S after it was last written; its holder gives up earlier, by its own clock, counted from
before the last write that succeeded, and for good: a lease that was dead for a while protected
nothing in that time, whoever renewed it later.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from torpor.errors import DeadlineExceeded, StoreError
from torpor.snapshot.repository.records import LeaseRecord, seal
from torpor.snapshot.repository.repository import new_id

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torpor.snapshot.repository.repository import Repository

BEAT_S: Final = 30.0
GIVE_UP_S: Final = 180.0
LEASE_S: Final = 300.0

log = logging.getLogger("torpor.snapshot")


def _boot_time() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A lease as a context manager: written at entry, renewed by a thread, deleted at exit.

    `check` is called by the holder before it makes anything reachable, or deletes anything.
    `folder` is where the lease lies. Raises StoreError at entry.
    """

    def __init__(
        self,
        repository: Repository,
        purpose: str,
        *,
        folder: str = "leases/",
        beat_s: float = BEAT_S,
        give_up_s: float = GIVE_UP_S,
        clock: Callable[[], float] = _boot_time,
    ) -> None:
        self._repository = repository
        self._purpose = purpose
        self._beat_s, self._give_up_s, self._clock = beat_s, give_up_s, clock
        self.key = f"{folder}{new_id().hex()}"
        self._beats = 0
        self._renewed_s = 0.0
        self._longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="torpor-lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._write()
        except BaseException:
            self._delete()  # its answer may be lost, the object there
            raise
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._delete()

    def check(self) -> None:
        """Raise DeadlineExceeded when the lease may be taken for dead soon, or ever was."""
        silent_s = max(self._longest_s, self._clock() - self._renewed_s)
        if silent_s > self._give_up_s:
            raise DeadlineExceeded(
                f"the {self._purpose} could not renew its lease in the store",
                reason=f"not for {silent_s:.0f} s; a collection may have thought it dead",
                hint="do it again",
            )

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self._write()
            except StoreError as error:
                log.warning("lease not renewed key=%s error=%s", self.key, error)

    def _write(self) -> None:
        began_s = self._clock()
        record = LeaseRecord(purpose=self._purpose, beats=self._beats)
        self._repository.store.put(self.key, seal(self._repository.domain, self.key, record))
        if self._beats:
            self._longest_s = max(self._longest_s, self._clock() - self._renewed_s)
        self._beats += 1
        self._renewed_s = began_s

    def _delete(self) -> None:
        """Also for a caller who was cancelled: the deletion itself must not be."""
        try:
            contextvars.Context().run(self._repository.store.delete, self.key)
        except StoreError as error:  # it ends by its age
            log.warning("lease not deleted key=%s error=%s", self.key, error)
