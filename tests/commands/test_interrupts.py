"""Ctrl-C and SIGTERM in the middle of a transfer: nothing stays, and a repeat succeeds."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import assert_same

if TYPE_CHECKING:
    from fixtures.homes import Furnished, Home

pytestmark = pytest.mark.slow


def interrupt_at(
    home: Home, operation: str, prefix: str, *words: str, signum: int = signal.SIGINT
) -> str:
    """Send a signal to a command that is at a request; what it said in the end."""
    process = subprocess.Popen(
        home.stalled_command(operation, prefix, *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "STALLED\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return err


def stored(home: Home, kind: str) -> list[str]:
    """The names of the objects of a kind."""
    return [path.name for path in Path(home.store[7:], kind).rglob("*") if path.is_file()]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("prefix", ["packs/", "index/", "snapshots/", "refs/"])
def test_push(a: Furnished, prefix: str, signum: int) -> None:
    """Wherever a push is interrupted: no lease, no ref; the next push succeeds."""
    err = interrupt_at(a.home, "put", prefix, "snapshot", "push", "saved", signum=signum)
    assert err.endswith("interrupted; nothing was left behind\n")
    assert stored(a.home, "leases") == []
    assert stored(a.home, "refs") == []
    assert a.home.run("snapshot", "push", "saved").code == 0
    assert a.home.run("store", "check", "--read-data").code == 0


@pytest.mark.parametrize("prefix", ["packs/", "snapshots/"])
def test_pull(a: Furnished, b: Home, prefix: str) -> None:
    """An interrupted pull leaves neither snapshot, image nor staging directory."""
    a.home.run("snapshot", "push", "saved")
    interrupt_at(b, "get_range", prefix, "snapshot", "pull", "saved")
    assert b.files() == []
    assert b.run("snapshot", "pull", "saved").code == 0
    assert_same(b.snapshots.get(a.saved.digest), a.saved)


def test_export_to_a_reader_that_stalls(a: Furnished) -> None:
    """A pipe that nobody empties does not keep an export that is to end."""
    process = subprocess.Popen(
        a.home.command("snapshot", "export", "saved", "-"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(512).startswith(b"torpor-archive")
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    process.communicate()


def test_import_from_a_writer_that_stalls(a: Furnished, b: Home) -> None:
    """An import that waits for the rest of its input can be interrupted and leaves nothing."""
    data = a.home.run_program("snapshot", "export", "saved", "-").stdout
    process = subprocess.Popen(
        b.command("snapshot", "import", "-"), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(data[: len(data) // 2])  # more than a pipe holds: it is being read
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    process.stdin.close()
    assert process.stderr is not None
    process.stderr.close()
    assert b.files() == []
