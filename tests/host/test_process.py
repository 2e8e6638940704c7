"""Finding processes by where they are."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from torpor.host.process import find_processes_in

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

_WORK = "import os, sys; {}; print('there', flush=True); sys.stdin.read()"


@pytest.mark.parametrize("move", ["os.chdir(sys.argv[1])", "os.chroot(sys.argv[1])"])
def test_processes_in_a_directory(tmp_path: Path, move: str) -> None:
    """By working directory, and by root directory as in a jail; no other process is found."""
    inside = tmp_path / "instances" / "a" / "root"
    inside.mkdir(parents=True)
    (tmp_path / "others").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", _WORK.format(move), inside],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == b"there\n"
        assert [found.pid for found in find_processes_in(tmp_path / "instances")] == [child.pid]
        assert find_processes_in(tmp_path / "others") == []
        child.stdin.close()
    assert find_processes_in(tmp_path / "instances") == []
