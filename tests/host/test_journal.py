"""The journal on a disk that is full: what exists can still be removed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from torpor.errors import NoSpace
from torpor.host.process import run
from torpor.node.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.host


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


def test_disk_full_from_the_start(small_disk: Path) -> None:
    """A home cannot be opened on a full disk, and the error says so."""
    fill(small_disk)
    with pytest.raises(NoSpace, match="full"):
        Journal(small_disk / "journal.sqlite")
