"""The journal's tables for what outlives the daemon: uploads, recipes, answers already given.

    remotes  a name and what the store should have of it. `wanted` is a digest, or empty for a name
             that is to be deleted there; `known` is what the store had when this node last knew:
             a digest, empty for nothing, `*` for whatever there is. `state` is pending (the node is
             ahead of the bucket), stored, or lost (somebody else's is there; `error` says what).
    recipes  a function's snapshot and how to start the function without it
    answers  an idempotency key and what was answered to its first request; `status` is 0 while
             that is under way

Blocking; any thread, any process, as the journal.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from torpor.structs import prepared

if TYPE_CHECKING:
    import sqlite3

    from torpor.node.journal import Change, Journal

ANYTHING: Final = "*"
_FIRST_WAIT_S: Final = 1.0
_ANSWERS_KEPT_NS: Final = 24 * 3600 * 10**9

RemoteState = Literal["pending", "stored", "lost"]


@dataclass(frozen=True)
class RemoteRow:
    """A row of the table `remotes`. `due_ns`: CLOCK_REALTIME of the next try."""

    name: str
    wanted: str
    known: str
    state: RemoteState
    error: str
    tries: int
    due_ns: int


class Remotes:
    """What the store should have, and what it had."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, name: str) -> RemoteRow | None:
        """The row of a name."""
        return next((row for row in self.rows() if row.name == name), None)

    def rows(self) -> list[RemoteRow]:
        """All rows by name."""
        with self._journal.transaction() as database:
            rows = database.execute("SELECT * FROM remotes ORDER BY name").fetchall()
        return [RemoteRow(**dict(row)) for row in rows]

    def want(self, name: str, digest: str, *, known: str) -> None:
        """The store is to have this; whatever was wanted before is not any more.

        While an earlier wish is pending the store still has what was known then.
        """
        self._execute(
            "INSERT INTO remotes (name, wanted, known, state) VALUES (?, ?, ?, 'pending')"
            " ON CONFLICT (name) DO UPDATE SET wanted = excluded.wanted, state = 'pending',"
            " known = excluded.known, error = '', tries = 0, due_ns = 0",
            name,
            digest,
            known,
        )

    def stored(self, name: str, digest: str) -> None:
        """The store has this under the name; a newer wish than that stays pending."""
        self._execute(
            "INSERT INTO remotes (name, wanted, known, state) VALUES (?, ?, ?, 'stored')"
            " ON CONFLICT (name) DO UPDATE SET known = excluded.known, error = '', tries = 0,"
            " due_ns = 0, state = CASE WHEN wanted = excluded.wanted THEN 'stored' ELSE state END",
            name,
            digest,
            digest,
        )

    def took(self, name: str, digest: str) -> None:
        """This node took over what the store has under the name, in place of its own."""
        self._execute(
            "INSERT OR REPLACE INTO remotes (name, wanted, known, state)"
            " VALUES (?, ?, ?, 'stored')",
            name,
            digest,
            digest,
        )

    def lost(self, row: RemoteRow, error: str) -> None:
        """Somebody else's is in the store; unless something else is wanted by now."""
        self._execute(
            "UPDATE remotes SET state = 'lost', error = ? WHERE name = ? AND wanted = ?",
            error,
            row.name,
            row.wanted,
        )

    def failed(self, row: RemoteRow, error: str, *, longest_wait_s: float) -> float:
        """It failed in passing: try again later. The seconds until then."""
        wait_s: float = min(_FIRST_WAIT_S * 2.0 ** min(row.tries, 16), longest_wait_s)
        self._execute(
            "UPDATE remotes SET error = ?, tries = tries + 1, due_ns = ?"
            " WHERE name = ? AND wanted = ?",
            error,
            time.time_ns() + int(wait_s * 1e9),
            row.name,
            row.wanted,
        )
        return wait_s

    def forget(self, row: RemoteRow) -> None:
        """Nothing is known of the name any more, unless something else is wanted by now."""
        self._execute("DELETE FROM remotes WHERE name = ? AND wanted = ?", row.name, row.wanted)

    def _execute(self, statement: str, *values: object) -> None:
        self._journal.write(lambda database: database.execute(statement, values))


class Recipe(msgspec.Struct, frozen=True):
    """How to start a function on its image without a snapshot, as its function.toml said."""

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    cwd: str


class Recipes:
    """The recipes of the functions that were deployed on this node."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, snapshot: str) -> Recipe | None:
        """The recipe of the function in a snapshot, None if it was not deployed here."""
        with self._journal.transaction() as database:
            row = database.execute(
                "SELECT recipe FROM recipes WHERE snapshot = ?", (snapshot,)
            ).fetchone()
        return None if row is None else msgspec.json.decode(row["recipe"], type=prepared(Recipe))

    def keeping(self, snapshot: str, recipe: Recipe) -> Change:
        """The change of the journal that keeps a recipe and forgets those that nothing needs."""

        def change(database: sqlite3.Connection) -> None:
            database.execute(
                "DELETE FROM recipes WHERE snapshot NOT IN (SELECT digest FROM refs)"
                " AND snapshot NOT IN (SELECT snapshot FROM instances)"
            )
            database.execute(
                "INSERT OR REPLACE INTO recipes VALUES (?, ?)",
                (snapshot, msgspec.json.encode(recipe)),
            )

        return change


@dataclass(frozen=True)
class Answer:
    """What was answered to a request: its status, 0 for nothing yet, and its JSON document."""

    request: str
    status: int
    body: bytes


class Answers:
    """Answers by idempotency key, kept for a day."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def get(self, key: str) -> Answer | None:
        """What was answered under that key."""
        with self._journal.transaction() as database:
            row: Any = database.execute("SELECT * FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(row["request"], row["status"], row["body"])

    def begin(self, key: str, request: str) -> None:
        """The request is about to be worked on: the key is its own, whatever happens to us.

        Raises NoSpace.
        """
        self._journal.reserve()
        self.put(key, Answer(request, 0, b""))

    def drop(self, key: str) -> None:
        """Nothing came of a request: it may be tried again under its key."""
        self._journal.write(
            lambda database: database.execute("DELETE FROM answers WHERE key = ?", (key,))
        )

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, and forget old ones."""
        now_ns = time.time_ns()

        def change(database: sqlite3.Connection) -> None:
            database.execute(
                "DELETE FROM answers WHERE created_ns < ?", (now_ns - _ANSWERS_KEPT_NS,)
            )
            database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                (key, answer.request, answer.status, answer.body, now_ns),
            )

        self._journal.write(change)
