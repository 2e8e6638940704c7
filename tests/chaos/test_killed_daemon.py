"""SIGKILL of the daemon at named places of its work, then the next daemon on the same home.

What was acknowledged lives on and answers with what it held; what was not is there as a whole or
not at all; journal, processes, files and slots agree.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import urllib.request
from typing import TYPE_CHECKING

import httpx
import pytest

from fixtures.commands import journal_of, wait_until
from fixtures.daemons import DaemonProcess
from fixtures.nodes import EXAMPLES
from fixtures.victims import Victim, ask, snapshots_of
from torpor.errors import Conflict, HostUnfit
from torpor.node.invoke import Request
from torpor.node.leftovers import find_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.config import Settings

pytestmark = [pytest.mark.vm, pytest.mark.chaos]


@pytest.fixture
def victim(deployed: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Victim]:
    """A daemon on the session's home; afterwards nothing is left on the host."""
    barrier = tmp_path / "barrier"
    monkeypatch.setenv("TORPOR_BARRIER_FILE", str(barrier))
    settings = {"store": deployed.store, "key": deployed.key}
    victim = Victim(deployed, DaemonProcess(deployed.home, settings), barrier)
    victim.served.start()
    try:
        yield victim
    finally:
        victim.end({row.id for row in journal_of(deployed).instances()})
        assert victim.served.stop() == 0
    assert find_leftovers(deployed) == []
    assert "Traceback" not in victim.served.said()


def test_restore(victim: Victim) -> None:
    """Before it runs nothing is left of it, after that it runs; its key never gives another one."""
    victim.keep()
    undone = ("instance recorded", "slot allocated", "vmm started", "vmm resumed", "instance woken")
    done = ("instance running", "answer made", "answer kept")
    for place in (*undone, *done):
        key = secrets.token_hex(8)
        with victim.killed_at(place), pytest.raises(httpx.TransportError):
            victim.post("/v1/instances", {"reference": "hello"}, key)
        made = victim.check()
        assert len(made) == (place in done), place
        again = victim.post("/v1/instances", {"reference": "hello"}, key)
        if place == "answer kept":
            assert {again.json()["instance"]} == made
        else:
            assert (again.status_code, "was killed" in again.text) == (409, True), place
        assert victim.check() == made
        victim.end(made)


def test_snapshot(victim: Victim) -> None:
    """The instance is not left paused; the snapshot has its name or is gone."""
    victim.keep()
    before = {snapshot for snapshot, _ in snapshots_of(victim)}
    for place in ("instance paused", "instance resumed", "snapshot published", "snapshot named"):
        with victim.killed_at(place), victim.served.client() as client, pytest.raises(HostUnfit):
            client.create_snapshot(victim.kept, name="cut-off")
        assert victim.check() == set()
        made = [names for snapshot, names in snapshots_of(victim) if snapshot not in before]
        assert made == ([("cut-off",)] if place == "snapshot named" else []), place
    with victim.served.client() as client:
        client.remove_snapshot("cut-off")


def test_fork(victim: Victim) -> None:
    """Parent and clones that were let go run on, with what they held; the others are gone."""
    victim.keep()
    for place, left in (
        *(("instance paused", 0), ("snapshot published", 0), ("fork captured", 0)),
        *(("vmm resumed", 0), ("clones made", 0), ("instance running", 1), ("clone released", 1)),
    ):
        with victim.killed_at(place), victim.served.client() as client, pytest.raises(HostUnfit):
            client.fork(victim.kept, count=2)
        clones = victim.check()
        assert len(clones) == left, place
        for row in journal_of(victim.settings).instances():
            assert ask(f"{row.address}:{row.port}")["count"] == 1
        victim.end(clones)


def test_stop(victim: Victim) -> None:
    """What was to end has ended when the next daemon answers; the others run on."""
    victim.keep()
    for place in ("stop claimed", "vmm ended", "slot released"):
        with victim.served.client() as client:
            doomed = client.restore("hello").instance
        with victim.killed_at(place), victim.served.client() as client, pytest.raises(HostUnfit):
            client.stop([doomed])
        assert victim.check() == set()


def test_deploy_and_delete(victim: Victim) -> None:
    """A function is there or not, and can be deployed and deleted again in either case."""
    before = snapshots_of(victim)
    for place in ("vmm started", "snapshot published", "function made", "function named"):
        with victim.killed_at(place), victim.served.client() as client, pytest.raises(HostUnfit):
            client.deploy(EXAMPLES / "hello", name="brief")
        assert victim.check() == set()
        with victim.served.client() as client:
            names = {function.name for function in client.functions()}
        assert ("brief" in names) == (place == "function named")
    for place in ("stop claimed", "instances stopped", "name dropped"):
        with victim.served.client() as client:
            assert client.invoke("brief", Request(), keep=True).status == 200
        with victim.killed_at(place), victim.served.client() as client, pytest.raises(HostUnfit):
            client.remove_function("brief")
        assert victim.check() == set()
    with victim.served.client() as client:
        assert "brief" not in {function.name for function in client.functions()}
    assert snapshots_of(victim) == before


def test_vmm_and_keeper_of_instances(victim: Victim) -> None:
    """A VM that is killed is removed by the daemon, and a request wakes the next one."""
    with victim.served.client() as client:
        gateway = client.status().gateway
        assert client.invoke("hello", Request(), keep=True).woken
        (row,) = journal_of(victim.settings).instances()
        assert row.vmm is not None
        os.kill(row.vmm.pid, signal.SIGKILL)
        wait_until(lambda: not journal_of(victim.settings).instances())
        with urllib.request.urlopen(f"{gateway}/f/hello/", timeout=60) as answer:
            assert answer.status == 200
    (other,) = victim.check()
    assert other != row.id


def test_two_deploys_at_once(victim: Victim) -> None:
    """One name, one node, at the same time: the second one is told, and nothing is left of it."""
    with victim.served.client() as client:
        names = {function.name for function in client.functions()}
    deploying = httpx.Client(transport=httpx.HTTPTransport(uds=str(victim.served.socket)))
    body = {"directory": str(EXAMPLES / "hello"), "name": "hello"}
    with (
        deploying,
        deploying.stream(
            "POST",
            "http://torpor/v1/functions",
            json=body,
            headers={"Accept": "application/x-ndjson"},
            timeout=120,
        ) as answer,
        victim.served.client() as client,
    ):
        lines = answer.iter_lines()
        assert "progress" in next(lines)
        with pytest.raises(Conflict):
            client.deploy(EXAMPLES / "hello")
        *_, last = lines
        assert "result" in json.loads(last)
        assert {function.name for function in client.functions()} == names
    assert victim.check() == set()
