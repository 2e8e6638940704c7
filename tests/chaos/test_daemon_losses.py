"""A daemon whose VMMs, pager, keeper and store are killed under it.

Requests are answered, if only later, or told clearly why not; the next one is answered; nothing is
left of what died, and host and journal agree.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import httpx
import pytest

from fixtures.commands import journal_of, wait_until
from fixtures.daemons import DaemonProcess
from fixtures.vault import NAME, check_slice
from fixtures.victims import Victim, snapshots_of
from torpor.errors import HostUnfit, VmmFailed
from torpor.node.invoke import Request, Response
from torpor.node.leftovers import find_leftovers
from torpor.pager.keeper import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from fixtures.minio import MinioServer
    from torpor import Client
    from torpor.config import Settings
    from torpor.host.process import ProcessId

pytestmark = [pytest.mark.vm, pytest.mark.chaos]

PLACES = (
    *("fuse taken", "fuse answering", "fuse answered", "recovering"),
    *("asked begin", "opening", "answering begin", "asked complete", "opened", "registered"),
    *("published", "answering complete"),
    *("asked go", "answering go", "fetching", "fetched"),
    *("asked hydrate", "asked close", "answering close"),
)
PUSHES = ("push fetched", "push storing")


def through_gateway(gateway: str, name: str, path: str = "") -> tuple[int, bytes]:
    """Status and body of what a function answers to a request through the gateway."""
    try:
        with urllib.request.urlopen(f"{gateway}/f/{name}/{path}", timeout=200) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def metrics_of(served: DaemonProcess) -> str:
    """What Prometheus reads."""
    transport = httpx.HTTPTransport(uds=str(served.socket))
    with httpx.Client(transport=transport, timeout=30) as http:
        return http.get("http://torpor/metrics").text


def kind_of(body: bytes) -> str:
    """Of which kind a problem of the gateway is."""
    return str(json.loads(body)["type"]).removeprefix("urn:torpor:problem:")


@pytest.fixture
def victim(deployed: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Victim]:
    """A daemon on the session's home, and a ledger with a row."""
    monkeypatch.setenv("TORPOR_BARRIER_FILE", str(tmp_path / "barrier"))
    served = DaemonProcess(deployed.home, {"store": deployed.store, "key": deployed.key})
    yield from serving(Victim(deployed, served, tmp_path / "barrier"), keeps=True)


def serving(victim: Victim, *, keeps: bool) -> Iterator[Victim]:
    """Have its daemon run, and prove afterwards that nothing is left."""
    victim.served.start()
    try:
        if keeps:
            victim.keep()
        yield victim
    finally:
        victim.end({row.id for row in journal_of(victim.settings).instances()})
        assert victim.served.stop() == 0
    assert find_leftovers(victim.settings) == []
    assert "Traceback" not in victim.served.said()


def kill_all(victim: Victim) -> None:
    """SIGKILL to each VMM but the kept one's."""
    for vmm in victim.vmms():
        vmm.kill()


def settled(victim: Victim, left: int = 0) -> set[str]:
    """That everything agrees when only so many are left beside the kept one; their ids."""
    wait_until(lambda: len(journal_of(victim.settings).instances()) == 1 + left)
    return victim.check()


def test_vmm_killed(victim: Victim) -> None:
    """Whatever is done with a VM whose VMM is killed, it is told or done, and nothing is left."""
    with victim.served.client() as client:
        kill_in_operations(victim, client)
        kill_in_requests(victim, client)


def kill_in_operations(victim: Victim, client: Client) -> None:
    """Restored, snapshotted, forked, stopped: a clear error or done, and nothing is left of it."""
    before = snapshots_of(victim)

    def killed_at(place: str, work: Callable[[], object]) -> Future[object]:
        return victim.meanwhile(place, work, lambda: kill_all(victim))

    gateway = client.status().gateway
    for place in ("vmm started", "vmm resumed"):
        with pytest.raises(VmmFailed):
            killed_at(place, lambda: client.restore("hello")).result()
        assert settled(victim) == set(), place
    for place in ("instance woken", "instance running"):
        killed_at(place, lambda: client.restore("hello")).result()
        assert settled(victim) == set(), place
    waking = killed_at("vmm started", lambda: through_gateway(gateway, "hello"))
    status, body = waking.result()  # type: ignore[misc]
    assert (status, kind_of(body)) == (503, "vmm-failed")
    assert through_gateway(gateway, "hello")[0] == 200
    doomed = settled(victim, 1).pop()
    with pytest.raises(VmmFailed):
        killed_at("instance paused", lambda: client.create_snapshot(doomed)).result()
    assert settled(victim) == set()
    assert snapshots_of(victim) == before
    for place in ("instance resumed", "snapshot published", "snapshot named"):
        doomed = client.restore("hello").instance
        killed_at(place, partial(client.create_snapshot, doomed, name="of-the-dead")).result()
        assert settled(victim) == set(), place
    victim.end({client.restore("of-the-dead").instance})
    client.remove_snapshot("of-the-dead")

    for place in ("clones made", "clone released"):
        doomed = client.restore("hello").instance
        killed_at(place, partial(client.fork, doomed)).result()
        assert settled(victim) == set(), place
    doomed = client.restore("hello").instance
    killed_at("fork captured", lambda: client.fork(doomed)).result()
    (clone,) = settled(victim, 1)
    assert clone != doomed
    with pytest.raises(VmmFailed):
        killed_at("vmm resumed", lambda: client.fork(clone)).result()
    assert settled(victim) == set()
    doomed = client.restore("hello").instance
    killed_at("stop claimed", lambda: client.stop([doomed])).result()
    assert settled(victim) == set()
    wait_until(lambda: snapshots_of(victim) == before)


def kill_in_requests(victim: Victim, client: Client) -> None:
    """Through the gateway or the API the request is told soon; the next one is answered."""
    with ThreadPoolExecutor(1) as pool:
        gateway = client.status().gateway

        def killed_in(ask: Callable[[], object]) -> Future[object]:
            assert through_gateway(gateway, "hello")[0] == 200  # by a connection that is kept
            (vmm,) = victim.vmms()
            vmm.signal(signal.SIGSTOP)  # it takes the request and does not answer
            asking = pool.submit(ask)
            signal.sigtimedwait([], 0.5)
            vmm.kill()
            asking.exception(timeout=15)
            assert settled(victim) == set()
            return asking

        woken = client.restore("hello").instance
        assert through_gateway(gateway, "hello")[0] == 200
        assert settled(victim, 1) == {woken}  # the gateway woke no second one
        status, body = killed_in(lambda: through_gateway(gateway, "hello")).result()  # type: ignore[misc]
        assert (status, kind_of(body)) == (502, "function-failed")
        with pytest.raises(VmmFailed, match="ended during GET /"):
            killed_in(lambda: client.invoke("hello", Request(), keep=True)).result()
        assert client.invoke("hello", Request(), keep=True).status == 200
        assert len(settled(victim, 1)) == 1


@pytest.fixture
def barriers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a file lets the pager be killed at the place that it is named after, once."""
    path = tmp_path / "barriers"
    path.mkdir()
    monkeypatch.setenv("TORPOR_PAGER_BARRIER", f"*={path}")
    return path


def settings_of(settings: Settings) -> dict[str, str]:
    """Where a store is and how to use it."""
    keys = ("store", "key", "s3_endpoint", "s3_access_key_id", "s3_secret_access_key")
    return {key: str(getattr(settings, key)) for key in keys}


@pytest.fixture
def lazy(
    lazy_settings: Settings, barriers: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Victim]:
    """A daemon that has nothing but a store with the vault in it, and wakes from there."""
    monkeypatch.setenv("TORPOR_BARRIER_FILE", str(barriers / "none"))
    times = {"store_retry_s": "200", "request_timeout_s": "200", "pager_deadline_s": "200"}
    more = {"snapshots": "remote", "lazy": "yes", "hydrate_bytes": str(1 << 20), **times}
    served = DaemonProcess(lazy_settings.home, {**settings_of(lazy_settings), **more})
    yield from serving(Victim(lazy_settings, served, barriers / "none"), keeps=False)
    assert not (lazy_settings.home / "pager").exists()


def ask_slice(gateway: str, number: int) -> str:
    """Ask the vault for a part through the gateway, and check it; the instance that answered."""
    status, body = through_gateway(gateway, NAME, str(number))
    assert status == 200, body
    instance = str(json.loads(body)["instance"])
    check_slice(Response(status, "", (), body, 0.0), number, instance)
    return instance


@pytest.mark.minio
def test_pager_killed_at_each_named_place(lazy: Victim, barriers: Path) -> None:
    """Requests through the gateway are answered rightly, also those that wait for a wake."""
    with lazy.served.client() as client, ThreadPoolExecutor(6) as pool:
        gateway = client.status().gateway

        def round_of(places: Sequence[str], *numbers: int) -> None:
            for place in places:
                (barriers / place).touch()
            answered = set(pool.map(lambda number: ask_slice(gateway, number), numbers))
            woken = {view.id for view in client.instances()}
            assert answered <= woken
            assert lazy.check() == woken
            client.stop(sorted(woken))
            assert lazy.check() == set()
            assert list(barriers.iterdir()) == [], "it was never there"

        round_of(PLACES, *range(6))
        for number, place in enumerate(PUSHES):  # one that was cut off is not begun again
            round_of([place], 6 + number)


@pytest.mark.minio
def test_pager_keeper_and_store_killed(lazy: Victim, minio: MinioServer) -> None:
    """Pager or keeper are replaced under their instances; with both the instance goes.

    A request that waits for it then is answered by another one. With the store killed in a wake the
    request is answered when it is back.
    """
    places = Places(lazy.settings.home)

    def kill(*names: str) -> None:
        found = [places.identity(name) for name in names]
        for process in found:
            assert process is not None
            process.signal(signal.SIGSTOP)  # neither replaces the other
        for process in found:
            assert process is not None
            process.signal(signal.SIGKILL)

    with lazy.served.client() as client, ThreadPoolExecutor(1) as pool:
        gateway = client.status().gateway
        first = ask_slice(gateway, 0)
        for number, name in enumerate(("keeper", "pager", "keeper"), 1):
            replaced = places.identity(name)
            kill(name)
            assert ask_slice(gateway, number) == first
            wait_until(partial(lives_anew, places, name, replaced))
        (vmm,) = lazy.vmms()
        vmm.signal(signal.SIGSTOP)  # it takes no request, and meets no page that is not there
        asking = pool.submit(ask_slice, gateway, 4)
        signal.sigtimedwait([], 0.5)
        kill("keeper", "pager")
        second = asking.result(timeout=30)
        assert second != first
        assert lazy.check() == {second}
        client.stop([second])

        asking = pool.submit(ask_slice, gateway, 5)
        wait_until(lazy.vmms)
        minio.kill()
        signal.sigtimedwait([], 2.0)
        minio.start()
        third = asking.result(timeout=60)
        assert lazy.check() == {third}


@pytest.mark.minio
def test_daemon_killed_in_a_lazy_wake(lazy: Victim) -> None:
    """Before the instance runs nothing is left of it, after that it answers, with its pager."""
    for number, (place, left) in enumerate((("vmm started", 0), ("instance running", 1))):
        with lazy.killed_at(place), lazy.served.client() as client, pytest.raises(HostUnfit):
            client.restore(NAME)
        made = lazy.check()
        assert len(made) == left, place
        with lazy.served.client() as client:
            answered = ask_slice(client.status().gateway, number)
            assert lazy.check() == made | {answered}
            assert len(made | {answered}) == 1
            client.stop([answered])


@pytest.mark.minio
def test_store_that_hangs(lazy_settings: Settings, deployed: Settings, minio: MinioServer) -> None:
    """What only a store has that hangs is told so soon enough, what is here wakes meanwhile.

    When it answers again all of it wakes.
    """
    home = lazy_settings.home
    words = ["cp", "-a", "--sparse=always", "--reflink=auto", deployed.home, home]
    subprocess.run(words, check=True)
    times = {"store_retry_s": "1", "store_timeout_s": "3", "store_ask_s": "1"}
    # no upload of what else is in the home
    settings = {**settings_of(lazy_settings), "upload_retry_s": "600", **times}
    served = DaemonProcess(home, {**settings, "snapshots": "remote"})
    minio.hang()
    for victim in serving(Victim(lazy_settings, served, home / "none"), keeps=False):
        with victim.served.client() as client, ThreadPoolExecutor(4) as pool:
            gateway = client.status().gateway
            asking = [pool.submit(through_gateway, gateway, NAME) for _ in range(2)]
            woken = pool.submit(through_gateway, gateway, "hello").result()
            assert not any(one.done() for one in asking)
            assert woken[0] == 200
            for one in asking:
                status, body = one.result(timeout=20)
                assert (status, kind_of(body)) == (503, "store-unreachable")
            assert through_gateway(gateway, "ledger")[0] == 200
            minio.go_on()
            ask_slice(gateway, 0)
            assert len(victim.check()) == 3
            told = metrics_of(served)
            assert 'torpor_cold_start_seconds_count{source="store-lazy"} 1.0' in told
            assert 'torpor_cold_start_seconds_bucket{le="0.1",source="local"}' in told
            assert re.search(r'torpor_pager_windows{source="pushed"} [1-9]', told)
            assert 'torpor_pager_stall_seconds{source="awaited"}' in told
            assert re.search(r'torpor_store_errors_total{error="\w+"} [1-9]', told)
            assert served.said().count("CloneIP=") == 3
            client.stop(sorted(victim.check()))


def lives_anew(places: Places, name: str, replaced: ProcessId | None) -> bool:
    """Whether another process has taken a place."""
    found = places.identity(name)
    return found is not None and found != replaced and found.is_alive()
