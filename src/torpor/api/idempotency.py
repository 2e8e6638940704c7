"""Requests with an `Idempotency-Key` are done once; their repeats get the first answer.

A key is written to the journal before the work begins, and the answer when it is done, before it
is sent; both are kept for a day. What failed may be tried again under its key. What a daemon was
killed in is not done again: nobody knows whether it was done. An answer for which the disk has no
room is kept in memory: what was done is answered all the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import TYPE_CHECKING

import msgspec

from torpor.errors import Conflict, NoSpace
from torpor.host.barrier import reach
from torpor.host.cancel import in_thread
from torpor.node.tables import Answer, Answers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from torpor.node.journal import Journal

log = logging.getLogger("torpor.api")


class Once:
    """The keys that are being worked on, and those that were. Belongs to one asyncio loop."""

    def __init__(self, journal: Journal) -> None:
        self._answers = Answers(journal)
        self._busy: set[str] = set()
        self._unwritten: dict[str, Answer] = {}

    async def do(
        self, key: str | None, request: str, work: Callable[[], Awaitable[object]]
    ) -> msgspec.Raw:
        """The encoded result of `work`, or of its first run under this key.

        Raises Conflict while that still runs, when the key was another request's, and when a daemon
        was killed at it.
        """
        if key is None:
            return msgspec.Raw(msgspec.json.encode(await work()))
        with self._claimed(key):
            known = self._unwritten.get(key) or await in_thread(self._answers.get, key)
            if known is not None:
                if known.request != request:
                    raise Conflict(
                        "the idempotency key was used for another request",
                        hint="take a new key for each thing to do, the same one for its repeats",
                    )
                if not known.status:
                    raise Conflict(
                        "the daemon was killed while it did what this idempotency key asked for",
                        reason="it may be done or not, and is not done twice",
                        hint="look whether it is done; if not, ask again with a new key",
                    )
                return msgspec.Raw(known.body)
            # neither in a thread: a cancellation must not lose what was done
            self._answers.begin(key, request)
            try:
                body = msgspec.json.encode(await work())
            except BaseException:
                self._drop(key)
                raise
            reach("answer made")
            self._keep(key, Answer(request, 200, body))
            reach("answer kept")
            return msgspec.Raw(body)

    def _keep(self, key: str, answer: Answer) -> None:
        try:
            self._answers.put(key, answer)
        except NoSpace as error:
            log.warning("an answer is kept in memory only key=%s error=%s", key, error)
            self._unwritten[key] = answer

    def _drop(self, key: str) -> None:
        try:
            self._answers.drop(key)
        except NoSpace as error:  # what is told is what went wrong before
            log.warning("a key stays taken key=%s error=%s", key, error)

    @contextlib.contextmanager
    def _claimed(self, key: str) -> Iterator[None]:
        if key in self._busy:
            raise Conflict(
                "a request with this idempotency key is under way",
                hint="repeat it when that has ended, to get its answer",
            )
        self._busy.add(key)
        try:
            yield
        finally:
            self._busy.discard(key)


def fingerprint(method: str, path: str, body: bytes) -> str:
    """What tells two requests under one key apart."""
    return f"{method} {path} {hashlib.sha256(body).hexdigest()}"
