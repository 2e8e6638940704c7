"""SIGKILL of the daemon, or of its store, at named places of an upload or deletion."""

from __future__ import annotations

import signal
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import wait_until
from fixtures.daemons import DaemonProcess, daemon, ending
from fixtures.victims import state_of
from torpor.errors import Incompatible, StoreUnreachable

from .test_remote import in_store, remote, states

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.homes import Furnished, Home
    from fixtures.minio import MinioServer

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
    served = DaemonProcess(a.home.path, remote(a.home))
    served.spawn()  # it may be dead before anybody saw it answer
    with ending(served):
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


def stands_still(served: DaemonProcess) -> bool:
    """Whether it has stopped itself."""
    assert served.process is not None
    return state_of(served.process.pid) == "T"


@pytest.mark.minio
def test_store_killed(
    a: Furnished,
    b: Home,
    mortal_minio: MinioServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in an upload or deletion it gets all when it is back; until then the node is ahead.

    A wake from a store that is gone is told so; one of what the node has needs none.
    """
    barrier = tmp_path / "barrier"
    monkeypatch.setenv("TORPOR_BARRIER_FILE", str(barrier))
    keys = ("store", "s3_endpoint", "s3_access_key_id", "s3_secret_access_key")
    settings = {key: str(getattr(mortal_minio.settings, key)) for key in keys}
    settings |= {"snapshots": "remote", "upload_retry_s": "1", "store_retry_s": "1"}
    barrier.write_text("stop upload begun")
    with daemon(a.home.path, **settings) as served, served.client() as client:

        def kill_store_at(place: str) -> None:
            wait_until(lambda: stands_still(served))
            mortal_minio.kill()
            assert served.process is not None
            served.process.send_signal(signal.SIGCONT)

        def restart_store() -> None:
            mortal_minio.start()
            mortal_minio.wait_ready()
            wait_until(lambda: client.status().pending == ())

        for place, then in (("upload begun", "stop upload sent"), ("upload sent", "")):
            kill_store_at(place)
            wait_until(
                lambda: any(text.startswith("pending: ") for text in states(served).values())
            )
            with pytest.raises(Incompatible):  # it has this one; no host runs a made-up one
                client.restore("f")
            barrier.write_text(then)
            restart_store() if not then else (mortal_minio.start(), mortal_minio.wait_ready())
        assert states(served) == {"f": "stored", "g": "stored"}
        barrier.write_text("stop deletion stored")
        client.remove_function("g")
        kill_store_at("deletion stored")
        restart_store()
        assert [function.name for function in client.functions()] == ["f"]
        mortal_minio.kill()
        with daemon(b.path, **settings) as fresh, fresh.client() as on_b:
            with pytest.raises(StoreUnreachable) as caught:
                on_b.restore("f")
            assert caught.value.hint
            url = f"{on_b.status().gateway}/f/f/"
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(url, timeout=30)
            mortal_minio.start()
            mortal_minio.wait_ready()
            with pytest.raises(Incompatible):
                on_b.restore("f")
