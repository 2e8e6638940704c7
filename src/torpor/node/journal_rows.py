"""The journal's tables, their versions, and their rows as objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from torpor.host.process import ProcessId

if TYPE_CHECKING:
    import sqlite3

    from torpor.units import Digest

SCHEMA_VERSION: Final = 3

InstanceState = Literal["creating", "running", "stopping"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
    id TEXT PRIMARY KEY,
    function TEXT NOT NULL,
    snapshot TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('creating', 'running', 'stopping')),
    owner_pid INTEGER NOT NULL,
    owner_ticks INTEGER NOT NULL,
    vmm_pid INTEGER,
    vmm_ticks INTEGER,
    slot INTEGER,
    address TEXT NOT NULL DEFAULT '',
    port INTEGER NOT NULL DEFAULT 0,
    created_ns INTEGER NOT NULL,
    keeper_pid INTEGER,
    keeper_ticks INTEGER,
    capturer_pid INTEGER,
    capturer_ticks INTEGER,
    booted INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS refs (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    updated_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS bases (
    key TEXT PRIMARY KEY,
    digest TEXT NOT NULL
) STRICT;
"""

_DAEMON = """
CREATE TABLE IF NOT EXISTS remotes (
    name TEXT PRIMARY KEY,
    wanted TEXT NOT NULL,
    known TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'stored', 'lost')),
    error TEXT NOT NULL DEFAULT '',
    tries INTEGER NOT NULL DEFAULT 0,
    due_ns INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS recipes (
    snapshot TEXT PRIMARY KEY,
    recipe BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    request TEXT NOT NULL,
    status INTEGER NOT NULL,
    body BLOB NOT NULL,
    created_ns INTEGER NOT NULL
) STRICT;
"""

_FROM_VERSION_1 = """
ALTER TABLE instances ADD COLUMN keeper_pid INTEGER;
ALTER TABLE instances ADD COLUMN keeper_ticks INTEGER;
ALTER TABLE instances ADD COLUMN capturer_pid INTEGER;
ALTER TABLE instances ADD COLUMN capturer_ticks INTEGER;
"""

_FROM_VERSION_2 = f"""
ALTER TABLE instances ADD COLUMN booted INTEGER NOT NULL DEFAULT 0;
{_DAEMON}
"""

SCHEMA_STEPS: Final = {
    0: _SCHEMA + _DAEMON,
    1: _FROM_VERSION_1 + _FROM_VERSION_2,
    2: _FROM_VERSION_2,
}
"""Version of a file, 0 for a new one -> what makes it SCHEMA_VERSION."""


@dataclass(frozen=True)
class InstanceRow:
    """One instance as the journal knows it.

    `snapshot` is what it was woken from. An instance that was `booted` has no memory of that: it
    runs the same function, or none if `snapshot` is empty.
    """

    id: str
    function: str
    snapshot: str
    state: InstanceState
    owner: ProcessId
    vmm: ProcessId | None
    slot: int | None
    address: str
    port: int
    created_ns: int
    keeper: ProcessId | None
    capturer: ProcessId | None
    booted: bool


@dataclass(frozen=True)
class Ref:
    """A name and the snapshot it points to."""

    name: str
    digest: Digest
    updated_ns: int


def fetch_instance(database: sqlite3.Connection, instance_id: str) -> InstanceRow | None:
    """The row of an instance, read in a transaction."""
    row = database.execute("SELECT * FROM instances WHERE id = ?", (instance_id,)).fetchone()
    return None if row is None else to_instance(row)


def to_instance(row: sqlite3.Row) -> InstanceRow:
    """A row of the table `instances`."""
    return InstanceRow(
        id=row["id"],
        function=row["function"],
        snapshot=row["snapshot"],
        state=row["state"],
        owner=ProcessId(row["owner_pid"], row["owner_ticks"]),
        vmm=_to_process(row, "vmm"),
        slot=row["slot"],
        address=row["address"],
        port=row["port"],
        created_ns=row["created_ns"],
        keeper=_to_process(row, "keeper"),
        capturer=_to_process(row, "capturer"),
        booted=bool(row["booted"]),
    )


def _to_process(row: sqlite3.Row, what: str) -> ProcessId | None:
    pid, ticks = row[f"{what}_pid"], row[f"{what}_ticks"]
    return None if pid is None else ProcessId(pid, ticks)
