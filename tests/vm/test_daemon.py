"""The daemon with real VMs: functions through API and gateway, forks, kills, drains, two nodes."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from fixtures.collectors import collecting
from fixtures.commands import journal_of, run_torpor, wait_until
from fixtures.daemons import daemon
from fixtures.nodes import EXAMPLES
from torpor.errors import NotFound
from torpor.net.log_line import parse_log_line
from torpor.node.invoke import Request
from torpor.node.leftovers import find_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.daemons import DaemonProcess
    from torpor import Client
    from torpor.config import Settings

pytestmark = pytest.mark.vm

ROW = Request("POST", "/", (("Content-Type", "application/json"),), b'{"amount": 1}')


@contextlib.contextmanager
def serving(settings: Settings, *words: str, **more: str) -> Iterator[DaemonProcess]:
    """A daemon on a home of the tests; what instances it leaves are ended after the body."""
    same = ("store", "key", "vmm", "firecracker", "jailer")
    given = {name: str(getattr(settings, name)) for name in same} | more
    with daemon(settings.home, *words, **given) as served:
        try:
            yield served
        finally:
            if not served.ended:
                with served.client() as client:
                    left = [one.id for one in client.instances()]
                    if left:
                        client.stop(left)


def remote(minio_settings: Settings) -> dict[str, str]:
    """The settings of a node that lives from a MinIO."""
    keys = ("s3_endpoint", "s3_region", "s3_access_key_id", "s3_secret_access_key")
    store = {key: str(getattr(minio_settings, key)) for key in keys}
    return {**store, "snapshots": "remote", "upload_retry_s": "1"}


@contextlib.contextmanager
def two_nodes(
    first: Settings, second: Settings, minio_settings: Settings, *, prefix: str
) -> Iterator[tuple[Client, Client]]:
    """Clients of the daemons of two homes that share a place in a MinIO and a key."""
    store = remote(minio_settings)
    bucket = f"{minio_settings.store}/{prefix}"  # not beside refs under other tests' keys
    with (
        serving(replace(first, store=bucket), **store) as on_a,
        serving(replace(second, store=bucket), **store) as on_b,
        on_a.client() as a,
        on_b.client() as b,
    ):
        yield a, b


def through_gateway(client: Client, name: str) -> tuple[int, Any]:
    """What a function answers to GET / through the gateway."""
    url = f"{client.status().gateway}/f/{name}/"
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.status, json.loads(answer.read())


def ask(address: str) -> dict[str, Any]:
    """What a ledger answers at an address of this host."""
    with urllib.request.urlopen(f"http://{address}/", timeout=60) as answer:
        return dict(json.loads(answer.read()))


def add(address: str) -> None:
    """One row more."""
    request = urllib.request.Request(f"http://{address}/", data=ROW.body, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 201


def test_forks_go_their_own_way(deployed: Settings) -> None:
    """A fork has the instance's memory and disk of one instant; then each writes its own.

    The instance runs on; repeated under its idempotency key the fork is not made again.
    """
    with serving(deployed) as served, served.client() as client:
        parent = client.restore("ledger")
        add(parent.address)
        transport = httpx.HTTPTransport(uds=str(served.socket))
        with httpx.Client(transport=transport, base_url="http://torpor", timeout=120) as http:
            path, headers = (
                f"/v1/instances/{parent.instance}/fork",
                {"Idempotency-Key": secrets.token_hex(8)},
            )
            forked, again = (
                http.post(path, json={"count": 2}, headers=headers).json() for _ in range(2)
            )
            other = http.post(path, json={"count": 3}, headers=headers)
            assert other.status_code == 409
        assert forked == again
        first, second = (clone["address"] for clone in forked["clones"])
        assert len(client.instances()) == 3
        add(first)
        add(first)
        add(second)
        counts = [ask(address)["count"] for address in (parent.address, first, second)]
        assert counts == [1, 3, 2]
        assert forked["pause_s"] < 5
        kept = {one.snapshot for one in client.snapshots()}
        assert forked["snapshot"] in kept
        run_torpor(deployed, "stop", *(one.id for one in client.instances()))
        assert client.instances() == []
        run_torpor(deployed, "snapshot", "gc")
        assert forked["snapshot"] not in {one.snapshot for one in client.snapshots()}
        assert [trace.instance for trace in client.traces()] == [
            parent.instance,
            *(clone["instance"] for clone in forked["clones"]),
        ]
        assert all(trace.steps_s["wake"] > 0 for trace in client.traces())


def test_killed_daemon_costs_no_instance(deployed: Settings) -> None:
    """SIGKILL: the VM runs on; the next daemon answers through it, and stops it when asked."""
    with serving(deployed) as served:
        with served.client() as client:
            invoked = client.invoke("ledger", ROW, keep=True)
            assert (invoked.status, invoked.woken) == (201, True)
            before = client.instances()
        served.kill()
        (row,) = journal_of(deployed).instances()
        assert row.vmm is not None
        assert row.vmm.is_alive()
        served.start()
        with served.client() as client:
            assert client.instances() == before
            assert through_gateway(client, "ledger") == (
                200,
                {"count": 1, "sum": 1, "last": 1, "integrity": "ok"},
            )
            assert not client.invoke("ledger", Request()).woken
            lines = client.follow_logs(before[0].id)
            assert next(lines)
            assert client.stop([before[0].id[:-2]]) == [before[0].id]
            assert list(lines) is not None  # it ends, for the instance has
            wait_until(lambda: not row.vmm or not row.vmm.is_alive())
            metrics = httpx.Client(transport=httpx.HTTPTransport(uds=str(served.socket)))
            with metrics:
                text = metrics.get("http://torpor/metrics").text
            assert 'torpor_gateway_responses_total{function="ledger",status="2xx"} 1.0' in text


def test_drain_leaves_instances(deployed: Settings) -> None:
    """SIGTERM ends the daemon alone; commands and the next daemon find the instance."""
    with serving(deployed) as served:
        with served.client() as client:
            restored = client.restore("ledger")
            add(restored.address)
        assert served.stop() == 0
        assert ask(restored.address)["count"] == 1
        assert json.loads(run_torpor(deployed, "ps", "--json"))[0]["id"] == restored.instance
        served.start()


def begin_slowly(served: DaemonProcess, gateway: str) -> socket.socket:
    """A request to ledger whose body is not whole; it is under way when this returns."""
    host, _, port = gateway.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = b"POST /f/ledger/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(ROW.body or b""))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(served.socket))) as http:
        under_way = 'torpor_gateway_in_flight{function="ledger"} 1.0'
        wait_until(lambda: under_way in http.get("http://torpor/metrics").text)
    return connection


def test_drain_lets_requests_end(deployed: Settings) -> None:
    """SIGTERM takes nobody new and waits for who is there; a second one does not wait."""
    with serving(deployed, drain_s="60") as served:
        for number, hurried in enumerate((False, True), start=1):
            with served.client() as client:
                assert through_gateway(client, "ledger")[0] == 200
                gateway = client.status().gateway
            assert served.process is not None
            with begin_slowly(served, gateway) as connection:
                served.process.send_signal(signal.SIGTERM)
                wait_until(lambda number=number: served.said().count("draining") == number)
                if hurried:
                    served.process.send_signal(signal.SIGTERM)
                    with contextlib.suppress(ConnectionResetError):
                        assert connection.recv(100) == b""
                else:
                    with pytest.raises(ConnectionRefusedError):
                        socket.create_connection(connection.getpeername())
                    connection.sendall(ROW.body or b"")
                    assert connection.recv(100).startswith(b"HTTP/1.1 201 ")
                assert served.process.wait(timeout=120) == 0
            served.start("--drain", "snapshot")
        with served.client() as client:
            (left,) = client.instances()
            assert ask(f"{left.address}:{left.port}")["count"] == 1


def test_drain_puts_instances_to_sleep(deployed: Settings) -> None:
    """With `--drain snapshot` each is snapshotted under its id and stopped; it wakes as it was."""
    with serving(deployed, "--drain", "snapshot") as served:
        with served.client() as client:
            restored = client.restore("ledger")
            add(restored.address)
        assert served.stop() == 0
        assert journal_of(deployed).instances() == []
        served.start("--drain", "leave")
        with served.client() as client:
            again = client.restore(restored.instance)
            assert ask(again.address)["count"] == 1
            client.stop([again.instance])
            client.remove_snapshot(restored.instance)


def test_off_boots_what_local_wakes(deployed: Settings) -> None:
    """With `--snapshots off` a function is booted for each cold start, and serves and snapshots."""
    with serving(deployed, "--snapshots", "off") as served, served.client() as client:
        invoked = client.invoke("hello", Request(), keep=True)
        assert invoked.status == 200
        assert {"boot", "function start"} <= invoked.steps_s.keys()
        (instance,) = client.instances()
        assert through_gateway(client, "hello")[0] == 200
        (line,) = [x for x in served.said().splitlines() if x.endswith(f"funcID={instance.id}")]
        assert parse_log_line(line)["CloneIP"] == instance.address
        captured = client.create_snapshot(instance.id, name="booted")
        client.stop([instance.id])
        assert served.stop() == 0
        served.start("--snapshots", "local")
        restored = client.restore("booted")
        assert "boot" not in restored.steps_s
        assert ask(restored.address)
        client.stop([restored.instance])
        assert client.remove_snapshot("booted") == captured.snapshot


def test_two_nodes_and_one_store(
    deployed: Settings, fresh_settings: Settings, minio_settings: Settings
) -> None:
    """Deployed on A a function answers on B at its first request; removed on A, B says so."""
    with two_nodes(deployed, fresh_settings, minio_settings, prefix="two-nodes") as (a, b):
        deployed_view = a.deploy(EXAMPLES / "hello", name="shared")
        wait_until(lambda: {f.name: f.store for f in a.functions()}["shared"] == "stored")
        assert through_gateway(b, "shared")[0] == 200
        (function,) = b.functions()
        assert (function.snapshot, function.store) == (deployed_view.snapshot, "stored")
        b.stop([one.id for one in b.instances()])
        a.remove_function("shared")
        wait_until(lambda: "shared" not in a.status().pending)
        with pytest.raises(NotFound, match="was deleted in the store"):
            b.restore("shared")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            through_gateway(b, "shared")
        assert b.functions() == []
    left = find_leftovers(fresh_settings)
    assert not any(str(fresh_settings.home) in line for line in left)


def test_two_nodes_that_deploy_at_once(
    deployed: Settings, imaged_settings: Settings, minio_settings: Settings
) -> None:
    """Both deploy the same name at the same time: one wins, the other is told, and wakes that."""
    with (
        two_nodes(deployed, imaged_settings, minio_settings, prefix="at-once") as nodes,
        ThreadPoolExecutor(2) as pool,
    ):
        deploying = [pool.submit(n.deploy, EXAMPLES / "hello", name="contested") for n in nodes]
        views = [one.result() for one in deploying]

        def said() -> list[str]:
            found = [{f.name: f.store for f in node.functions()}["contested"] for node in nodes]
            return [text.split(":")[0] for text in found]

        wait_until(lambda: sorted(said()) == ["lost", "stored"])
        winner, loser = said().index("stored"), said().index("lost")
        (lost,) = [e for e in nodes[loser].recent_events() if e.kind == "upload.lost"]
        assert (lost.subject, lost.data["wanted"]) == ("contested", views[loser].snapshot)
        assert views[winner].snapshot[:12] in lost.data["error"]
        woken = nodes[loser].restore("contested")
        (instance,) = nodes[loser].instances()
        assert (instance.id, instance.snapshot) == (woken.instance, views[winner].snapshot)
        assert ask(woken.address)
        nodes[loser].stop([woken.instance])
        nodes[winner].remove_function("contested")
        wait_until(lambda: nodes[winner].status().pending == ())


def test_commands_on_a_daemon(deployed: Settings, tmp_path: Path) -> None:
    """Deploy with progress, invoke, snapshot, fork, logs and rm, all asked of the daemon.

    Its spans tell of the wakes that they began, step by step.
    """
    with (
        collecting() as collector,
        serving(deployed, otlp_endpoint=collector.endpoint) as served,
    ):
        out = run_torpor(deployed, "deploy", EXAMPLES / "hello", "--name", "twice")
        assert "twice, revision 1" in out
        answer = json.loads(run_torpor(deployed, "invoke", "twice", "--keep", "--json"))
        assert answer["woken"]
        instance = answer["instance"]
        assert "stood still" in run_torpor(deployed, "fork", instance)
        run_torpor(deployed, "snapshot", "create", instance, "--name", "aside")
        assert run_torpor(deployed, "logs", instance)
        assert len(run_torpor(deployed, "stop", instance).splitlines()) == 1
        run_torpor(deployed, "snapshot", "rm", "aside")
        run_torpor(deployed, "rm", "twice")
        with served.client() as client:
            assert client.instances() == []
            kinds = [event.kind for event in client.recent_events()]
        assert kinds.count("instance.ready") == 2
        assert kinds.count("instance.removed") >= 2
        assert kinds[-1] == "function.removed"
        assert served.stop() == 0
    names = {span.span_id: span.name for span in collector.spans}
    above = {(span.name, names.get(span.parent_span_id, "")) for span in collector.spans}
    assert {("deploy", ""), ("invoke", ""), ("fork", ""), ("create_snapshot", "")} <= above
    assert {("wake twice", "invoke"), ("wake twice", "fork"), ("load", "wake twice")} <= above
