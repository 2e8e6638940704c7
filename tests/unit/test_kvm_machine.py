"""A level 1 whose kernel stops is told from one whose work takes long."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvm import machine
from kvm.disks import Job
from kvm.machine import Level1

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# a QEMU whose guest does nothing but answer the pulse
ANSWERING = r"""
import re, socket, sys
(descriptor,) = re.findall(r"id=pulse,fd=(\d+)", " ".join(sys.argv))
with socket.socket(fileno=int(descriptor)) as port:
    while data := port.recv(4096):
        port.sendall(data)
"""


@pytest.fixture
def level1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Level1]:
    """A level 1 that answers at once; 0.4 s without an answer are too long."""
    monkeypatch.setattr(machine, "PULSE_S", 0.02)
    monkeypatch.setattr(machine, "SILENT_S", 0.4)
    monkeypatch.setattr(machine, "find_built", lambda: (tmp_path, tmp_path))
    monkeypatch.setattr(machine, "make_run_disk", lambda job, work: work / "run")
    program = [sys.executable, "-c", ANSWERING]
    monkeypatch.setattr(machine, "_machine", lambda *words: program)
    with Level1(Job(["true"]), tmp_path, on_output=lambda data: None) as made:
        yield made


@pytest.mark.slow
def test_stopped_level_1_ends_the_wait(level1: Level1) -> None:
    """While it answers it is waited for, however long its work takes; stopped it is silent."""
    over = threading.Event()
    threading.Timer(1.5, over.set).start()
    assert not level1.wait(60, cancelled=over)
    assert over.is_set()
    assert not level1.is_silent
    assert level1.process is not None
    level1.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert not level1.wait(60)
    assert level1.is_silent
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_level_1_that_never_answered_is_not_silent(level1: Level1) -> None:
    """One that still boots has its time."""
    assert level1.process is not None
    level1.process.send_signal(signal.SIGSTOP)
    assert not level1.wait(1.0)
    assert not level1.is_silent
