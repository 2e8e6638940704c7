"""A node whose functions live in the store: `snapshots = "remote"`.

The store's ref is the truth about a name, but for what this node has deployed, snapshotted or
removed and not uploaded yet: that is in the journal and wins here until it is there. A ref is only
replaced if it still is what this node last knew it to be; so of two nodes that deploy one name one
wins, and the other is told.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import Conflict, DataError, InvalidInput, NotFound, StoreError, StoreUnreachable
from torpor.host.barrier import reach
from torpor.node.parts import log
from torpor.node.tables import ANYTHING, Remotes
from torpor.snapshot.repository.stored import BrokenRef, StoredRef
from torpor.units import Digest, is_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.node.exchange import Exchange
    from torpor.node.parts import Parts
    from torpor.node.tables import RemoteRow
    from torpor.snapshot.repository.repository import Repository

_SILENT_S: Final = 5.0


@dataclass(frozen=True)
class Before:
    """What a deploy found when it began, see `Remote.before`.

    `known` is what it may replace in the store, `noted` what the row said, `own` the snapshots of
    this node that may get there while it runs.
    """

    known: str
    noted: str
    own: frozenset[str]


@dataclass(frozen=True)
class Newer:
    """What the store has under a name is to be fetched: `ref` is its object, if that was read."""

    ref: bytes = b""


class Remote:
    """What one node knows of the store's refs. Blocking; any thread.

    Without `snapshots = "remote"` it asks nothing and wants nothing.
    """

    def __init__(self, parts: Parts, exchange: Exchange) -> None:
        self._parts = parts
        self._exchange = exchange
        self.rows = Remotes(parts.journal)

    @property
    def active(self) -> bool:
        """Whether the store is asked at all."""
        return self._parts.settings.snapshots == "remote"

    def known(self, name: str) -> str:
        """What the store has under a name: as `known` in `node.tables`.

        If the store does not answer, or not soon, it is what this node knew last.
        """
        if not self.active:
            return ""
        row = self.rows.get(name)
        if row is not None and row.state == "pending":
            return row.known
        try:
            with self._asking(may_wait=row is None) as repository:
                return _digest_of(repository.read_ref_to_replace(name))
        except StoreError as error:
            log.warning("the store was not asked before a deploy name=%s error=%s", name, error)
            return "" if row is None else row.known

    def before(self, name: str) -> Before:
        """What a deploy that begins now may replace, for `want_deployed` at its end."""
        row, ref = self.rows.get(name), self._parts.journal.ref(name)
        own = [] if ref is None else [str(ref.digest)]
        if row is not None and row.state == "pending":
            own.append(row.wanted)
        return Before(self.known(name), "" if row is None else row.known, frozenset(own))

    def want_deployed(self, name: str, digest: str, before: Before) -> None:
        """Have the store's ref point to what was deployed.

        An older revision of this node's own that was uploaded meanwhile is replaced too.
        """
        row = self.rows.get(name)
        known = before.known
        if row is not None and row.known != before.noted and row.known in before.own:
            known = row.known
        self.want(name, digest, known=known)

    def want(self, name: str, digest: str, *, known: str = ANYTHING) -> None:
        """Have the store's ref point to a snapshot; an empty digest: have it deleted."""
        if self.active:
            self.rows.want(name, digest, known=known)
            self._parts.events.publish("store.ahead", name, wanted=digest)

    def want_deleted(self, name: str) -> bool:
        """Have a name deleted in the store if it is there; whether it is, as far as is known.

        What this node had only wanted to upload is forgotten.
        """
        if not self.active:
            return False
        row = self.rows.get(name)
        known = self.known(name)
        if row is not None and not known:
            self.rows.forget(row)
        if known:
            self.want(name, "", known=known)
        return bool(known)

    def newer(self, reference: str) -> Newer | None:
        """What a cold start must fetch of the store, if anything: asked before each.

        A function that was deleted in the store is forgotten here. A store that does not answer
        soon is not waited for if this node has something of that name, and not asked again for a
        while. Raises NotFound that says so, StoreError.
        """
        if not self.active or not is_name(reference):
            return None
        row, local = self.rows.get(reference), self._parts.journal.ref(reference)
        if row is not None and row.state == "pending":
            if not row.wanted:
                raise NotFound(f"{reference!r} was removed on this node")
            return Newer() if local is None else None
        try:
            with self._asking(may_wait=local is None) as repository:
                stored = repository.read_ref(reference)
        except (StoreError, DataError) as error:
            if local is None:
                raise
            log.warning("woken without asking the store name=%s error=%s", reference, error)
            self._parts.events.publish("store.unreachable", reference, error=str(error))
            return None
        if stored is not None:
            is_other = local is None or local.digest != stored.record.snapshot
            return Newer(stored.sealed) if is_other else None
        if local is not None and row is not None:
            self._parts.journal.drop_ref(reference)
            self.rows.forget(row)
            raise NotFound(
                f"{reference!r} was deleted in the store",
                reason="another node removed it, so it is gone here too",
                hint="deploy it again, here or there",
            )
        return None

    @contextlib.contextmanager
    def _asking(self, *, may_wait: bool) -> Iterator[Repository]:
        """The repository for one question; without `may_wait` for one that is answered soon."""
        if may_wait:
            yield self._exchange.repository()
            return
        silence = self._parts.silence
        if time.monotonic() < silence.until:
            raise StoreUnreachable("the store did not answer a moment ago")
        try:
            yield self._exchange.repository(ask_s=self._parts.settings.store_ask_s)
        except StoreUnreachable:
            silence.until = time.monotonic() + _SILENT_S
            raise

    def took(self, reference: str, digest: Digest) -> None:
        """A reference was fetched from the store and is this node's now."""
        if self.active and is_name(reference):
            self.rows.took(reference, digest)

    def find_drift(self) -> None:
        """Want uploaded what this node's function names mean and the store was never told.

        Such are functions of before `remote`, and snapshots that took their function's place.
        """
        rows = {row.name: row for row in self.rows.rows()}
        for ref in self._parts.journal.refs():
            row = rows.get(ref.name)
            if (row is not None and row.wanted == ref.digest) or not is_name(ref.name):
                continue
            if self._kind(ref.digest) == "function" and (row is None or row.state != "lost"):
                self.want(ref.name, ref.digest, known="" if row is None else row.known)

    def upload(self, row: RemoteRow) -> None:
        """Do what a pending row wants. Raises Conflict when somebody else's is in the store."""
        if row.wanted:
            self._push(row)
        else:
            self._delete(row)

    def _push(self, row: RemoteRow) -> None:
        reach("upload begun")
        try:
            self._exchange.push(row.wanted, name=row.name, known=row.known)
        except NotFound:
            ref = self._parts.journal.ref(row.name)
            if ref is not None and ref.digest == row.wanted:
                raise
            if ref is None:  # it was removed here meanwhile; what replaced it is found as drift
                self.rows.forget(row)
            return
        reach("upload named")
        self.rows.stored(row.name, row.wanted)

    def _delete(self, row: RemoteRow) -> None:
        repository = self._exchange.repository()
        found = _digest_of(repository.read_ref_to_replace(row.name))
        if found and row.known not in (ANYTHING, found):
            raise Conflict(
                f"{row.name} was deployed by another node before it could be deleted",
                reason=f"it points to snapshot {found[:12]}",
            )
        if found:
            repository.delete_ref(row.name)
            reach("deletion stored")
        self.rows.forget(row)

    def _kind(self, digest: Digest) -> str | None:
        try:
            return self._parts.snapshots.get(digest).manifest.kind
        except (NotFound, DataError, InvalidInput):
            return None


def _digest_of(ref: StoredRef | BrokenRef | None) -> str:
    """What a ref of the store means, for the column `known`."""
    match ref:
        case None:
            return ""
        case StoredRef():
            return ref.record.snapshot
        case BrokenRef():  # to be mended, whatever it was
            return ANYTHING
