"""The journal: what this home has made on the host, in SQLite, written before it is made.

Tables:

    instances  one row from before the first resource of an instance is made until after the last
               one is gone. `state` is creating, running or stopping; `owner` is the process at
               work on it while it is not running; `keeper` is the command that it is to end with,
               if any; `capturer` is the command that snapshots it: from before its pause until
               after its resume.
    refs       name -> snapshot digest: a function, or a snapshot that was given a name
    bases      key -> snapshot digest of a base
    remotes, recipes, answers
               see `node.tables`

Blocking; one connection a thread-hop, opened for each call, so it is safe from any thread and any
number of processes; a writer waits up to ten seconds for another. A spare file beside it holds room
for what is written when the disk is full. Who begins something new has it there first (`reserve`),
else NoSpace; who ends, undoes or removes something may use it up. So a full disk keeps nothing
alive, and what was done is written down.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Final, TypeVar

from torpor.errors import Conflict, Damaged, NoSpace, NotFound
from torpor.host.process import ProcessId
from torpor.host.space import is_full
from torpor.node.journal_rows import (
    SCHEMA_STEPS,
    SCHEMA_VERSION,
    InstanceRow,
    Ref,
    fetch_instance,
    to_instance,
)
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Change = Callable[[sqlite3.Connection], object]

T = TypeVar("T")

_BUSY_S: Final = 10.0
_SPARE_BYTES: Final = 256 * 1024
_CHANGE_COUNTER_AT: Final = 24
_WHEN_FULL: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)


class Journal:
    """The journal of one home."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises Damaged when it is not a journal, NoSpace."""
        self._path = path
        self._spare = path.with_name(path.name + ".spare")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.transaction() as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version in SCHEMA_STEPS:
                for statement in SCHEMA_STEPS[version].split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise Damaged(
                    f"the journal {path} has version {version}",
                    reason=f"this torpor reads version {SCHEMA_VERSION}",
                    hint="use the torpor that wrote it, or another --home",
                )

    def add_instance(
        self, instance_id: str, *, function: str, snapshot: str, port: int, booted: bool = False
    ) -> None:
        """Record an instance that is about to be made; this process owns it. Raises NoSpace."""
        owner = _this_process()
        self.reserve()
        with self.transaction() as database:
            database.execute(
                "INSERT INTO instances (id, function, snapshot, state, owner_pid, owner_ticks,"
                " port, created_ns, booted) VALUES (?, ?, ?, 'creating', ?, ?, ?, ?, ?)",
                (
                    instance_id,
                    function,
                    snapshot,
                    owner.pid,
                    owner.start_ticks,
                    port,
                    time.time_ns(),
                    booted,
                ),
            )

    def reserve(self) -> None:
        """Have room for what is yet to be written of something new. Raises NoSpace."""
        try:
            with self._spare.open("ab") as spare:
                os.posix_fallocate(spare.fileno(), 0, _SPARE_BYTES)
        except OSError as error:
            self._spare.unlink(missing_ok=True)
            raise NoSpace(f"the disk of {self._path} is full", reason=str(error)) from None

    def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Make a change in a transaction; on a full disk in the spare room. Raises NoSpace."""
        try:
            with self.transaction() as database:
                return change(database)
        except NoSpace:
            self._spare.unlink(missing_ok=True)
        with self.transaction() as database:
            return change(database)

    def change_count(self) -> int:
        """Another number after each change, whoever made it; cheap. 0 if the file is not there.

        It is the change counter of the file's header, which has no clock's grain.
        """
        try:
            with self._path.open("rb", buffering=0) as file:
                return int.from_bytes(os.pread(file.fileno(), 4, _CHANGE_COUNTER_AT), "big")
        except OSError:
            return 0

    def set_slot(self, instance_id: str, slot: int, address: str) -> None:
        """Record the slot that an instance got."""
        self._update(instance_id, "slot = ?, address = ?", (slot, address))

    def set_vmm(self, instance_id: str, vmm: ProcessId) -> None:
        """Record the VMM process of an instance."""
        self._update(instance_id, "vmm_pid = ?, vmm_ticks = ?", (vmm.pid, vmm.start_ticks))

    def set_running(self, instance_id: str, *, kept: bool = False) -> None:
        """The instance is ready for all commands; `kept`: it is to end with this process."""
        keeper = _this_process() if kept else None
        self._update(
            instance_id,
            "state = 'running', keeper_pid = ?, keeper_ticks = ?",
            (keeper.pid, keeper.start_ticks) if keeper else (None, None),
        )

    def claim_stop(self, instance_id: str) -> InstanceRow | None:
        """Take over the removal of an instance: the row as it was, or None if it is gone already.

        Raises Conflict while a live command snapshots it, or another one makes or removes it.
        """
        return self.write(functools.partial(_claim_stop, instance_id=instance_id))

    def claim_capture(self, instance_id: str) -> None:
        """This process is about to snapshot an instance, or to undo what a dead one left of that.

        Raises NotFound, Conflict when it does not run or a live command snapshots it already.
        """
        self.write(functools.partial(_claim_capture, instance_id=instance_id))

    def end_capture(self, instance_id: str) -> None:
        """The instance runs on, or is gone."""
        self._update(instance_id, "capturer_pid = ?, capturer_ticks = ?", (None, None))

    def drop_instance(self, instance_id: str) -> None:
        """Forget an instance of which nothing is left."""
        self._execute("DELETE FROM instances WHERE id = ?", instance_id)

    def instance(self, instance_id: str) -> InstanceRow:
        """One instance by id or unique prefix. Raises NotFound, Conflict for several."""
        rows = [row for row in self.instances() if row.id.startswith(instance_id)]
        exact = [row for row in rows if row.id == instance_id]
        if len(exact or rows) == 1:
            return (exact or rows)[0]
        if rows:
            raise Conflict(
                f"{instance_id!r} fits {len(rows)} instances",
                hint=f"give more of the id: {', '.join(row.id for row in rows[:8])}",
            )
        raise _no_instance(instance_id)

    def instances(self) -> list[InstanceRow]:
        """All instances, oldest first."""
        with self.transaction() as database:
            rows = database.execute("SELECT * FROM instances ORDER BY created_ns, id").fetchall()
        return [to_instance(row) for row in rows]

    def set_ref(self, name: str, digest: Digest, *, along: Change | None = None) -> None:
        """Point a name to a snapshot, and change more along with it. Raises NoSpace before that."""
        self.reserve()

        def change(database: sqlite3.Connection) -> None:
            database.execute(
                "INSERT INTO refs VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE"
                " SET digest = excluded.digest, updated_ns = excluded.updated_ns",
                (name, digest, time.time_ns()),
            )
            if along is not None:
                along(database)

        self.write(change)

    def ref(self, name: str) -> Ref | None:
        """The ref of that name."""
        return next((ref for ref in self.refs() if ref.name == name), None)

    def refs(self) -> list[Ref]:
        """All refs by name."""
        with self.transaction() as database:
            rows = database.execute("SELECT * FROM refs ORDER BY name").fetchall()
        return [Ref(row["name"], Digest(row["digest"]), row["updated_ns"]) for row in rows]

    def drop_ref(self, name: str) -> None:
        """Forget a name; the snapshot stays until nothing points to it."""
        self._execute("DELETE FROM refs WHERE name = ?", name)

    def set_base(self, key: str, digest: Digest) -> None:
        """Record the base for a key."""
        self._execute("INSERT OR REPLACE INTO bases VALUES (?, ?)", key, digest)

    def drop_base(self, digest: Digest) -> None:
        """Forget a base."""
        self._execute("DELETE FROM bases WHERE digest = ?", digest)

    def bases(self) -> dict[str, Digest]:
        """Key -> digest of every base."""
        with self.transaction() as database:
            rows = database.execute("SELECT * FROM bases").fetchall()
        return {row["key"]: Digest(row["digest"]) for row in rows}

    def _update(self, instance_id: str, assignment: str, values: tuple[object, ...]) -> None:
        self._execute(f"UPDATE instances SET {assignment} WHERE id = ?", *values, instance_id)

    def _execute(self, statement: str, *values: object) -> None:
        self.write(lambda database: database.execute(statement, values))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, undone when the body raises. Raises NoSpace, Conflict, Damaged."""
        try:
            database = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            with contextlib.closing(database):
                database.row_factory = sqlite3.Row
                database.execute("PRAGMA synchronous = NORMAL")
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise _translated(error, self._path) from error


def _this_process() -> ProcessId:
    return ProcessId.of(os.getpid())


def _claim_stop(database: sqlite3.Connection, *, instance_id: str) -> InstanceRow | None:
    me = _this_process()
    row = fetch_instance(database, instance_id)
    if row is None:
        return None
    if row.state != "running" and row.owner != me and row.owner.is_alive():
        raise _busy(row, row.owner, f"is {row.state}")
    if row.capturer is not None and row.capturer.is_alive():
        raise _busy(row, row.capturer, "is being snapshotted")
    database.execute(
        "UPDATE instances SET state = 'stopping', owner_pid = ?, owner_ticks = ? WHERE id = ?",
        (me.pid, me.start_ticks, instance_id),
    )
    return row


def _claim_capture(database: sqlite3.Connection, *, instance_id: str) -> None:
    row = fetch_instance(database, instance_id)
    if row is None:
        raise _no_instance(instance_id)
    if row.state != "running":
        raise _busy(row, row.owner, f"is {row.state}")
    if row.capturer is not None and row.capturer.is_alive():
        raise _busy(row, row.capturer, "is being snapshotted")
    me = _this_process()
    database.execute(
        "UPDATE instances SET capturer_pid = ?, capturer_ticks = ? WHERE id = ?",
        (me.pid, me.start_ticks, instance_id),
    )


def _busy(row: InstanceRow, by: ProcessId, what: str) -> Conflict:
    return Conflict(
        f"instance {row.id} {what}",
        reason=f"process {by.pid} is at work on it",
        hint="wait for that command to end",
    )


def _no_instance(instance_id: str) -> NotFound:
    return NotFound(f"there is no instance {instance_id!r}", hint="`torpor ps` lists them")


def _translated(error: sqlite3.DatabaseError, path: Path) -> Exception:
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL or (
        error.sqlite_errorcode & 0xFF in _WHEN_FULL and is_full(path.parent)
    ):
        return NoSpace(f"the disk of {path} is full", reason=str(error))
    if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
        return Conflict(
            f"the journal {path} is locked by another command", hint="try again in a moment"
        )
    return Damaged(
        f"the journal {path} cannot be used",
        reason=str(error),
        hint="use another --home, or restore this file from a backup",
    )
