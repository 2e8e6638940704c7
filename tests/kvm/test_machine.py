"""A level 1 that stops is told from one whose work takes long."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

import pytest

from kvm import machine
from kvm.disks import Job
from kvm.machine import Level1

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.kvm
@pytest.mark.slow
def test_stopped_level_1_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers the pulse while its job runs, whatever that does; stopped, it ends the wait."""
    monkeypatch.setattr(machine, "SILENT_S", 3.0)
    over = threading.Event()
    after = threading.Timer(4, over.set)
    job = Job(["bash", "-c", "echo busy; while :; do :; done"])
    with Level1(job, tmp_path, on_output=lambda _: after.start()) as level1:
        assert not level1.wait(120, cancelled=over)
        assert over.is_set()
        assert not level1.is_silent
        assert level1.process is not None
        level1.process.send_signal(signal.SIGSTOP)
        assert not level1.wait(60)
        assert level1.is_silent
