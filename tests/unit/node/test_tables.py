"""What of a daemon's is in the journal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from torpor.node.journal import Journal
from torpor.node.tables import ANYTHING, Answer, Answers, Recipe, Recipes, RemoteRow, Remotes
from torpor.units import Digest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A new journal."""
    return Journal(tmp_path / "journal.sqlite")


@pytest.fixture
def remotes(journal: Journal) -> Remotes:
    """Its table."""
    return Remotes(journal)


def only(remotes: Remotes) -> RemoteRow:
    """The one row."""
    (row,) = remotes.rows()
    return row


def test_wish_that_is_done(remotes: Remotes) -> None:
    """Pending until it is stored; then the store is known to have it."""
    remotes.want("f", "d1", known="")
    assert (only(remotes).state, only(remotes).known) == ("pending", "")
    remotes.stored("f", "d1")
    assert (only(remotes).state, only(remotes).known) == ("stored", "d1")


def test_newer_wish_than_what_was_just_stored(remotes: Remotes) -> None:
    """It stays pending, and knows what the store has by now."""
    remotes.want("f", "d1", known="")
    remotes.want("f", "d2", known="")
    remotes.stored("f", "d1")
    row = only(remotes)
    assert (row.wanted, row.state, row.known) == ("d2", "pending", "d1")


def test_outcome_of_a_wish_that_is_not_any_more(remotes: Remotes) -> None:
    """Lost, failed and forgotten say nothing about a newer wish."""
    remotes.want("f", "d1", known="")
    old = only(remotes)
    remotes.want("f", "d2", known=ANYTHING)
    remotes.lost(old, "somebody else")
    remotes.failed(old, "no connection", longest_wait_s=60)
    remotes.forget(old)
    row = only(remotes)
    assert (row.wanted, row.state, row.error, row.tries) == ("d2", "pending", "", 0)
    remotes.lost(row, "somebody else")
    assert (only(remotes).state, only(remotes).error) == ("lost", "somebody else")
    remotes.took("f", "d3")
    assert (only(remotes).state, only(remotes).wanted, only(remotes).error) == ("stored", "d3", "")
    remotes.forget(only(remotes))
    assert remotes.get("f") is None


def test_waits_grow_up_to_the_longest(remotes: Remotes) -> None:
    """1, 2, 4, … seconds; the next try is due when the last wait is over."""
    remotes.want("f", "d1", known="")
    waits = [remotes.failed(only(remotes), "no", longest_wait_s=10) for _ in range(40)]
    assert waits[:5] == [1, 2, 4, 8, 10]
    assert waits[-1] == 10
    row = only(remotes)
    assert (row.tries, row.error) == (40, "no")
    assert 0 < row.due_ns - time.time_ns() <= 10 * 10**9


def test_recipes_go_with_their_snapshots(journal: Journal) -> None:
    """Those of snapshots without name or instance are forgotten with the next deploy."""
    recipes = Recipes(journal)
    recipe = Recipe(("run",), (("A", "b"),), "/app")
    journal.set_ref("f", Digest("d1"), along=recipes.keeping("d1", recipe))
    assert recipes.get("d1") == recipe
    journal.add_instance("one", function="f", snapshot="d1", port=1)
    for digest in ("d2", "d3"):
        journal.set_ref("f", Digest(digest), along=recipes.keeping(digest, recipe))
    assert [recipes.get(digest) is not None for digest in ("d1", "d2", "d3")] == [True, False, True]
    journal.drop_instance("one")
    journal.set_ref("f", Digest("d3"), along=recipes.keeping("d3", recipe))
    assert recipes.get("d1") is None


def test_answers_are_kept_for_a_day(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones go when the next one comes."""
    answers = Answers(journal)
    answers.put("one", Answer("r", 200, b"1"))
    assert answers.get("one") == Answer("r", 200, b"1")
    later_ns = time.time_ns() + 25 * 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later_ns)
    answers.put("two", Answer("r", 200, b"2"))
    assert answers.get("one") is None
    assert answers.get("two") is not None
