"""Who a process is, whatever becomes of it meanwhile."""

from __future__ import annotations

import subprocess

import pytest

from torpor.host.process import ProcessId


def test_identity_of_a_child_that_has_ended() -> None:
    """It has one until it is reaped, and is not taken for alive."""
    child = subprocess.Popen(["true"])
    while (identity := ProcessId.of_child(child.pid)).is_alive():
        pass
    with pytest.raises(ProcessLookupError):
        ProcessId.of(child.pid)
    assert identity.wait(timeout_s=0)
    child.returncode = 0
    with pytest.raises(ProcessLookupError):
        ProcessId.of_child(child.pid)
