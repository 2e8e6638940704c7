"""What a command tells while it works: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
from typing import TYPE_CHECKING

from torpor.cli.progress import Progress

if TYPE_CHECKING:
    import pytest

    from fixtures.homes import Furnished, Home

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
BAR = re.compile(rb"snapshot \S+ \d+\.\d/\d+\.\d KiB \? -:--:--")


def test_bar_on_a_terminal(a: Furnished, b: Home) -> None:
    """On a terminal a transfer has a bar with bytes, rate and remaining time while it lasts."""
    a.home.run("snapshot", "push", "saved")
    reader, terminal = os.openpty()
    process = subprocess.Popen(
        b.stalled_command("get_range", "packs/", "snapshot", "pull", "saved"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    seen = b""
    while not BAR.search(ESCAPES.sub(b"", seen)):
        seen += os.read(reader, 4096)
    process.send_signal(signal.SIGINT)
    while not seen.endswith(b"nothing was left behind\r\n"):
        seen += os.read(reader, 4096)
    os.close(reader)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_line_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere each phase that ends is one line, however many steps it had."""
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    with Progress(quiet=False) as progress:
        progress.say("building")
        for done in (0, 1024, 2048, 2048):
            progress.step("memory", done, 2048)
        progress.step("half", 1, 2)
        progress.step("nothing", 0, 0)
        progress.step("unknown", 5, None)
    lines = out.getvalue().splitlines()
    assert lines[0] == "building ..."
    assert len(lines) == 2
    assert re.fullmatch(r"memory: 2\.0 KiB in .*, .*/s", lines[1])


def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json nothing is told."""
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    with Progress(quiet=True) as progress:
        progress.say("building")
        progress.step("memory", 1, 1)
    assert out.getvalue() == ""
