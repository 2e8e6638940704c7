"""SIGKILL of the daemon at named places of an upload or deletion, then the next daemon."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import wait_until
from fixtures.daemons import daemon

from .test_remote import in_store, remote, states

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished

pytestmark = pytest.mark.slow


def dies(served: DaemonProcess, barrier: Path) -> None:
    """It is killed at the place that was named."""
    assert served.process is not None
    assert served.process.wait(timeout=60) == -signal.SIGKILL, served.said()
    assert not barrier.exists()


@pytest.mark.parametrize("place", ["upload begun", "upload sent", "upload named"])
def test_upload(a: Furnished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The next daemon finishes it; the store checks as whole, and the deletion is finished too."""
    barrier = tmp_path / "barrier"
    monkeypatch.setenv("TORPOR_BARRIER_FILE", str(barrier))
    barrier.write_text(place)
    with daemon(a.home.path, **remote(a.home)) as served:
        dies(served, barrier)
        assert in_store(a.home).keys() == ({"f"} if place == "upload named" else set())
        served.start()
        wait_until(lambda: states(served) == {"f": "stored", "g": "stored"})
        assert in_store(a.home) == {"f": a.f.digest, "g": a.g.digest}
        barrier.write_text("deletion stored")
        with served.client() as client:
            client.remove_function("g")
        dies(served, barrier)
        served.start()
        with served.client() as client:
            wait_until(lambda: client.status().pending == ())
            assert [function.name for function in client.functions()] == ["f"]
        assert in_store(a.home) == {"f": a.f.digest}
    assert a.home.run("store", "check").code == 0
