"""Every request of the agent in a booted guest."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from torpor.errors import FunctionFailed, GuestFailed
from torpor.image.agent import Ending

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.vm.guest.conftest import Guest

    from torpor.image.agent import AgentClient

pytestmark = pytest.mark.vm

SERVE = ["probe", "serve"]
PORT = 8080


def attach(app: Path, guest: Guest) -> None:
    """Put the app's bytes where the placeholder was, as a host does between base and function."""
    with app.open("rb") as source, guest.app.open("r+b") as target:
        target.write(source.read())


def start(guest: Guest, client: AgentClient) -> None:
    client.start(SERVE, port=PORT)
    client.await_listening(PORT, timeout_s=20)
    guest.read_console("probe serves")


def wake(client: AgentClient, *, time_ns: int | None = None) -> None:
    client.wake(
        time_ns=time_ns or time.time_ns(),
        entropy=secrets.token_bytes(64),
        hostname="clone-7",
        instance_id="id-7",
    )


def test_boot_answers_ping(guest: Guest, record_property: Callable[[str, object], None]) -> None:
    """A booted guest answers; its console shows no panic and no failed mount."""
    with guest.client() as client:
        assert client.ping().protocol == 1
        assert client.stats().function == "none"
    record_property("boot_s", round(guest.boot_s, 2))
    assert b"anic" not in guest.console


def test_function_runs_on_image_app_and_scratch(guest: Guest, app: Path) -> None:
    """The app lies over the image though its disk was empty at boot; writes go to scratch."""
    with guest.client() as client:
        assert client.run(["probe", "note", "/warm", "up"], timeout_s=20) == Ending(status=0)
        assert client.run(["probe", "exit", "5"], timeout_s=20) == Ending(status=5)
        with pytest.raises(FunctionFailed, match="cannot execute nothing"):
            client.run(["nothing"], timeout_s=20)
        attach(app, guest)
        start(guest, client)
        assert guest.ask("cat /srv/of-image") == "image"
        assert guest.ask("cat /srv/of-app") == "app"
        assert guest.ask("cat /srv/replaced") == "app"
        assert guest.ask("cat /warm") == "up"
        guest.ask("note /kept after start")
        assert guest.ask("cat /kept") == "after start"
        mounts = guest.ask("cat /proc/mounts")
        for place in ("/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/tmp", "/run"):
            assert f" {place} " in mounts
        assert client.stats().function == "running"


def test_start_without_an_app_is_refused(guest: Guest, app: Path) -> None:
    """An app disk that is still empty is an error that names it; a later start succeeds."""
    with guest.client() as client:
        with pytest.raises(GuestFailed, match="app disk cannot be mounted"):
            client.start(SERVE, port=PORT)
        attach(app, guest)
        with pytest.raises(FunctionFailed, match="cannot execute /no/command"):
            client.start(["/no/command"], port=PORT)
        start(guest, client)


def test_wake_makes_an_instance_of_its_own(guest: Guest, app: Path) -> None:
    """After `wake` clock, host name, instance id, hosts and hooks are those of the request."""
    attach(app, guest)
    with guest.client() as client:
        start(guest, client)
        long_ago_ns = 1_500_000_000 * 10**9
        wake(client, time_ns=long_ago_ns)
        assert 0 <= int(guest.ask("time")) - long_ago_ns < 20 * 10**9
        wake(client)
        assert abs(client.stats().clock_ns - time.time_ns()) < 10**9
        assert guest.ask("hostname") == "clone-7"
        assert guest.ask("cat /etc/hostname") == "clone-7"
        assert guest.ask("cat /run/torpor/instance-id") == "id-7"
        assert "172.16.0.2 clone-7 # torpor" in guest.ask("cat /etc/hosts")
        assert guest.ask("cat /hooks").splitlines() == 2 * ["10-first id-7", "20-second id-7"]
        guest.ask("note /bad 9")
        with pytest.raises(FunctionFailed, match=r"wake\.d/10-first exited with status 9"):
            wake(client)


def test_names_given_before_start_stay(guest: Guest, app: Path) -> None:
    """A function that starts in a guest that has woken before finds its names in the new root."""
    attach(app, guest)
    with guest.client() as client:
        wake(client)
        start(guest, client)
    assert guest.ask("cat /run/torpor/instance-id") == "id-7"
    assert guest.ask("cat /etc/hostname") == "clone-7"


def test_exit_is_reported(guest: Guest, app: Path) -> None:
    """A function's end is in stats, in `await`, and on the console in one line."""
    attach(app, guest)
    with guest.client() as client:
        start(guest, client)
        guest.ask("exit 3")
        guest.read_console("torpor: function exited with status 3\r?\n")
        assert client.stats().ending == Ending(status=3)
        with pytest.raises(FunctionFailed, match="exited with status 3"):
            client.await_listening(PORT, timeout_s=20)


def test_sync_puts_writes_on_the_disk(guest: Guest, app: Path, tmp_path: Path) -> None:
    """What was written before `sync` is in the disk's file when it replied."""
    attach(app, guest)
    with guest.client() as client:
        start(guest, client)
        guest.ask("note /row one")
        client.sync()
    copy = tmp_path / "copy"
    copy.write_bytes(guest.scratch.read_bytes())
    assert subprocess.run(["e2fsck", "-fy", copy], capture_output=True, check=False).returncode <= 1
    shown = subprocess.run(
        ["debugfs", "-R", "cat /upper/row", copy], capture_output=True, check=True
    )
    assert shown.stdout == b"one\n"


def test_stop_leaves_a_clean_disk(guest: Guest, app: Path) -> None:
    """After `stop` the file system on the scratch disk needs no journal and has no fault."""
    attach(app, guest)
    with guest.client() as client:
        start(guest, client)
        guest.ask("note /row one")
        client.stop(timeout_s=5)
        assert client.stats().function == "exited"
    checked = subprocess.run(
        ["e2fsck", "-fn", guest.scratch], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    assert "journal" not in checked.stdout
    assert "wrong" not in checked.stdout


def test_garbage_leaves_the_guest_usable(guest: Guest, app: Path) -> None:
    """Garbage, overlong lines, half-closed and many connections: function and agent go on."""
    attach(app, guest)
    address = ("127.0.0.1", guest.agent_port)
    with guest.client() as client:
        start(guest, client)
    pieces = (b"x" * 70_000, b"\0\xff\n", b"run arg=%zz\nping", b"ping\n")
    with contextlib.ExitStack() as stack:
        for number in range(40):
            connection = stack.enter_context(socket.create_connection(address, timeout=20))
            connection.sendall(pieces[number % 4])
            if number % 3 == 0:
                connection.shutdown(socket.SHUT_WR)
        with guest.client() as client:
            assert client.stats().function == "running"
    assert guest.ask("cat /srv/of-app") == "app"
    with guest.client() as client:
        wake(client)
        client.sync()
