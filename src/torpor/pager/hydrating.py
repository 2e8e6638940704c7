"""Hydration: what no guest has touched yet, fetched into the chunk cache in the background."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from torpor.errors import TorporError
from torpor.pager.fetcher import Priority

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.pager.fetcher import Chunk, Fetcher
    from torpor.pager.served import StoredFile

_BATCH_CHUNKS: Final = 64

log = logging.getLogger("torpor.pager")


class Hydration:
    """Fetches files' chunks that are not here, least urgent of all, within bounds.

    It ends when everything was asked for, after `limit_bytes` of sealed chunks, after `limit_s`,
    when it is stopped, or at the first failure: demand reads are none of its business. `began_s`
    and `ended_s` are seconds of CLOCK_MONOTONIC, 0 until then.
    """

    def __init__(
        self, files: Sequence[StoredFile], fetcher: Fetcher, *, limit_bytes: int, limit_s: float
    ) -> None:
        self._files = files
        self._fetcher = fetcher
        self._limit_bytes = limit_bytes
        self._limit_s = limit_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hydrate", daemon=True)
        self.fetched_bytes = 0
        self.began_s = self.ended_s = 0.0
        self.is_complete = False
        """Whether, at the end, the chunk cache had every window of the files."""

    def start(self) -> None:
        """Begin; returns at once."""
        self.began_s = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Begin no further batch."""
        self._stop.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when time is up."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        until_s = time.monotonic() + self._limit_s
        try:
            for file in self._files:
                if not self._hydrate(file, until_s):
                    return
            self.is_complete = all(
                file.is_here(entry) for file in self._files for entry in file.map
            )
        except TorporError as error:
            log.info("hydration ended error=%s", error)
        finally:
            self.ended_s = time.monotonic()

    def _hydrate(self, file: StoredFile, until_s: float) -> bool:
        """Fetch what lacks of a file; whether no bound was met."""
        if file.cache is None:  # nowhere to put it
            return False
        missing = (file.chunk(entry) for entry in file.map if not file.is_here(entry))
        while wanted := list(itertools.islice(missing, _BATCH_CHUNKS)):
            batch = self._affordable(wanted)
            if self._stop.is_set() or time.monotonic() > until_s:
                return False
            self._fetcher.fetch(batch, Priority.HYDRATION)
            self.fetched_bytes += sum(chunk.length for chunk in batch)
            if len(batch) < len(wanted):
                return False
        return True

    def _affordable(self, batch: list[Chunk]) -> list[Chunk]:
        left = self._limit_bytes - self.fetched_bytes
        chosen = []
        for chunk in batch:
            left -= chunk.length
            if left < 0:
                break
            chosen.append(chunk)
        return chosen
