"""The journal says who is at work on an instance, and lets nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings
from torpor.errors import Conflict, NotFound
from torpor.host.process import ProcessId
from torpor.node import journal as journal_module
from torpor.node.instance import Instances
from torpor.node.journal import Journal
from torpor.node.paging import Paging
from torpor.node.parts import open_parts
from torpor.node.reconcile import reconcile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.node.parts import Parts

GONE = ProcessId(2**22 + 1, 1)
"""A process that cannot be: pids end at 2**22."""


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A node of its own with a registry of its own."""
    settings = Settings(home=tmp_path / "home", runtime_dir=tmp_path / "run")
    return open_parts(settings)


@pytest.fixture
def journal(parts: Parts) -> Iterator[Journal]:
    """With one instance, which runs, until the end of the test."""
    parts.journal.add_instance("one", function="f", snapshot="", port=80)
    parts.journal.set_running("one")
    yield parts.journal
    parts.journal.drop_instance("one")


@pytest.fixture
def other() -> Iterator[ProcessId]:
    """Another live process."""
    child = subprocess.Popen(["sleep", "1000"])
    try:
        yield ProcessId.of(child.pid)
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def acting_as(process: ProcessId) -> Iterator[None]:
    """What the body writes into the journal is written by that process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "_this_process", lambda: process)
        yield


def test_home_of_an_older_torpor(tmp_path: Path) -> None:
    """A journal of version 1 is taken over with its rows."""
    path = tmp_path / "journal.sqlite"
    Journal(path).add_instance("old", function="f", snapshot="s", port=80)
    with contextlib.closing(sqlite3.connect(path)) as database:
        for who in ("keeper", "capturer"):
            for what in ("pid", "ticks"):
                database.execute(f"ALTER TABLE instances DROP COLUMN {who}_{what}")
        database.execute("ALTER TABLE instances DROP COLUMN booted")
        for table in ("remotes", "recipes", "answers"):
            database.execute(f"DROP TABLE {table}")
        database.execute("PRAGMA user_version = 1")
        database.commit()
    journal = Journal(path)
    (row,) = journal.instances()
    assert (row.id, row.keeper, row.capturer) == ("old", None, None)
    journal.set_running("old")
    journal.claim_capture("old")
    journal.drop_instance("old")


def test_one_snapshot_at_a_time(journal: Journal, other: ProcessId) -> None:
    """While a live command snapshots an instance nobody snapshots or removes it."""
    with acting_as(other):
        journal.claim_capture("one")
    for claim in (journal.claim_capture, journal.claim_stop):
        with pytest.raises(Conflict, match=r"snapshotted[^$]*at work"):
            claim("one")
    journal.end_capture("one")
    journal.claim_capture("one")


def test_snapshot_of_a_dead_command_is_nobodys(journal: Journal) -> None:
    """What a killed command was at can be taken over."""
    with acting_as(GONE):
        journal.claim_capture("one")
    journal.claim_capture("one")
    assert journal.instance("one").capturer not in (None, GONE)


def test_only_what_runs_is_snapshotted(journal: Journal, other: ProcessId) -> None:
    """An instance that is made or removed is a Conflict, none is NotFound."""
    with acting_as(other):
        journal.claim_stop("one")
    with pytest.raises(Conflict, match="stopping"):
        journal.claim_capture("one")
    with pytest.raises(NotFound):
        journal.claim_capture("none")


async def test_removal_waits_for_another_remover(
    parts: Parts, journal: Journal, other: ProcessId
) -> None:
    """`stop` of an instance that another command is just removing succeeds when that is done."""
    with acting_as(other):
        journal.claim_stop("one")
    stopping = asyncio.ensure_future(Instances(parts, Paging(parts)).end("one"))
    done, _ = await asyncio.wait([stopping], timeout=0.2)
    assert not done
    journal.drop_instance("one")
    async with asyncio.timeout(20):
        await stopping


async def test_removal_takes_over_from_a_dead_remover(
    parts: Parts, journal: Journal, other: ProcessId
) -> None:
    """A remover that is killed while another waits for it leaves the work to that one."""
    with acting_as(other):
        journal.claim_stop("one")
    stopping = asyncio.ensure_future(Instances(parts, Paging(parts)).end("one"))
    done, _ = await asyncio.wait([stopping], timeout=0.2)
    assert not done
    other.kill()
    async with asyncio.timeout(20):
        await stopping
    assert journal.instances() == []


@pytest.mark.parametrize("keeper_lives", [True, False])
async def test_instance_that_is_to_end_with_its_command(
    parts: Parts, journal: Journal, other: ProcessId, keeper_lives: bool
) -> None:
    """An instance whose command was killed is removed; that of a live one stays."""
    journal.set_vmm("one", other)
    with acting_as(ProcessId.of(os.getppid()) if keeper_lives else GONE):
        journal.set_running("one", kept=True)
    paging = Paging(parts)
    removed = await reconcile(parts, Instances(parts, paging), paging)
    assert removed == ([] if keeper_lives else ["one"])
    assert other.is_alive() == keeper_lives


async def test_unreadable_instance_does_not_stop_other_commands(
    parts: Parts, journal: Journal, other: ProcessId
) -> None:
    """An instance that cannot be resumed any more keeps nobody from working."""
    journal.set_vmm("one", other)
    with acting_as(GONE):
        journal.claim_capture("one")
    paging = Paging(parts)
    assert await reconcile(parts, Instances(parts, paging), paging) == []
    assert [row.id for row in journal.instances()] == ["one"]


def test_what_no_row_names_is_removed(parts: Parts) -> None:
    """A directory of instances that the journal does not know, and what runs in it."""
    stray = parts.instances_dir / "stray"
    stray.mkdir()
    child = subprocess.Popen(["sleep", "1000"], cwd=stray)
    try:
        process, paging = ProcessId.of(child.pid), Paging(parts)
        assert asyncio.run(reconcile(parts, Instances(parts, paging), paging)) == []
        assert not stray.exists()
        assert not process.is_alive()
    finally:
        child.kill()
        child.wait()
