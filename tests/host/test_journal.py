"""The journal on a disk that is full: what exists can still be removed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from torpor.errors import NoSpace
from torpor.host.process import run
from torpor.node.journal import Journal
from torpor.node.tables import Answer, Answers, Remotes
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.host

DIGEST = Digest("1" * 64)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path])
    try:
        yield tmp_path
    finally:
        run(["umount", tmp_path])


def fill(disk: Path) -> None:
    """Write until no byte fits."""
    with (disk / "filling").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


def test_full_disk_refuses_new_instances_and_lets_old_ones_go(small_disk: Path) -> None:
    """On a full disk no row is added; one that is there is read, claimed and dropped."""
    journal = Journal(small_disk / "journal.sqlite")
    journal.add_instance("old", function="", snapshot="", port=0)
    fill(small_disk)
    with pytest.raises(NoSpace, match="full"):
        journal.add_instance("new", function="", snapshot="", port=0)
    assert [row.id for row in journal.instances()] == ["old"]
    assert journal.claim_stop("old") is not None
    journal.drop_instance("old")
    assert journal.instances() == []


def test_what_was_done_is_written_on_a_full_disk(small_disk: Path) -> None:
    """Answers, removals and wishes take the spare room; nothing new is begun when that is used."""
    journal = Journal(small_disk / "journal.sqlite")
    answers, remotes = Answers(journal), Remotes(journal)
    journal.set_ref("old", DIGEST)
    answers.begin("key", "request")
    fill(small_disk)
    answers.put("key", Answer("request", 200, bytes(8192)))
    journal.drop_ref("old")
    remotes.want("old", "", known=DIGEST)
    fill(small_disk)
    with pytest.raises(NoSpace, match="full"):
        answers.begin("another", "request")
    with pytest.raises(NoSpace, match="full"):
        journal.set_ref("new", DIGEST)
    kept = answers.get("key")
    assert kept is not None
    assert kept.status == 200
    assert [row.state for row in remotes.rows()] == ["pending"]
    assert (journal.refs(), answers.get("another")) == ([], None)


def test_disk_full_from_the_start(small_disk: Path) -> None:
    """A home cannot be opened on a full disk, and the error says so."""
    fill(small_disk)
    with pytest.raises(NoSpace, match="full"):
        Journal(small_disk / "journal.sqlite")
