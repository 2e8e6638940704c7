"""Both clients and the command line against a real daemon: the same answers as without one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.commands import TORPOR
from torpor import Client
from torpor.config import Settings
from torpor.errors import Conflict, HostUnfit, InvalidInput, NotFound, TorporError
from torpor.node.invoke import Request
from torpor.node.node import Node
from torpor.node.service import LocalService

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished


pytestmark = pytest.mark.slow


def local(home: Path, method: str, *words: Any) -> Any:  # noqa: ANN401
    """What a service in this process answers."""

    async def main() -> Any:  # noqa: ANN401
        async with Node.open(Settings(home=home)) as node:
            return await getattr(LocalService(node), method)(*words)

    return asyncio.run(main())


@pytest.mark.parametrize("method", ["functions", "snapshots", "instances"])
def test_lists_are_those_of_the_node(lasting: DaemonProcess, method: str) -> None:
    """Blocking, asyncio, and no daemon: one answer."""

    async def far() -> Any:  # noqa: ANN401
        async with lasting.async_client() as client:
            return await getattr(client, method)()

    with lasting.client() as client:
        near = local(lasting.home, method)
        assert getattr(client, method)() == asyncio.run(far()) == near
        assert len(near) == {"functions": 2, "snapshots": 4, "instances": 0}[method]


def refused(work: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """Kind and words of the error that a call raises."""
    with pytest.raises(TorporError) as caught:
        work()
    error = caught.value
    return type(error), error.message, error.reason, error.hint


@pytest.mark.parametrize(
    ("method", "words", "kind"),
    [
        ("invoke", ("nothing", Request()), NotFound),
        ("remove_function", ("nothing",), NotFound),
        ("remove_function", ("saved",), Conflict),
        ("restore", ("nothing",), NotFound),
        ("fork", ("nothing",), NotFound),
        ("stop", (["nothing"],), NotFound),
        ("logs", ("nothing",), NotFound),
        ("create_snapshot", ("nothing",), NotFound),
        ("remove_snapshot", ("f",), Conflict),
        ("remove_snapshot", ("nothing",), NotFound),
    ],
)
def test_errors_are_those_of_the_node(
    lasting: DaemonProcess, method: str, words: tuple[object, ...], kind: type
) -> None:
    """Class, message, reason and hint come through, from both clients."""

    async def far() -> None:
        async with lasting.async_client() as client:
            await getattr(client, method)(*words)

    with lasting.client() as client:
        found = refused(lambda: getattr(client, method)(*words))
    assert found[0] is kind
    assert found == refused(lambda: asyncio.run(far()))
    assert found == refused(lambda: local(lasting.home, method, *words))


def test_deploy_of_what_is_no_function(lasting: DaemonProcess, tmp_path: Path) -> None:
    """The daemon reads the directory; its error comes at the end of the lines of progress."""
    (tmp_path / "function.toml").write_text('name = "x"\n')
    with lasting.client() as client, pytest.raises(InvalidInput, match=r"function\.toml"):
        client.deploy(tmp_path)


def test_snapshots_are_deleted_and_collected(a: Furnished, served: DaemonProcess) -> None:
    """What a client deletes is gone from the node, and told as an event."""
    with served.client() as client:
        assert client.remove_snapshot("saved") == a.saved.digest
        assert client.remove_function("f").stopped == ()
        assert [function.name for function in client.functions()] == ["g"]
        kinds = []
        for event in client.events(after=0):
            kinds.append((event.kind, event.subject))
            if event.kind == "function.removed":
                break
        assert kinds == [("snapshot.removed", "saved"), ("function.removed", "f")]
        assert [one.revision for one in client.revisions("g")] == [1]
        assert client.traces() == []
        assert client.status().home == str(a.home.path)
    assert a.f.digest not in {one.digest for one in a.home.snapshots.list()}


def command(home: Path, *words: str) -> tuple[int, str, str]:
    """A command as a process of its own."""
    done = subprocess.run(
        [str(TORPOR), "--home", str(home), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_commands_say_the_same_with_a_daemon(a: Furnished, served: DaemonProcess) -> None:
    """Output, errors and exit codes; and it is the daemon that was asked."""
    lines = (
        ("ls",),
        ("ps",),
        ("snapshot", "ls", "--json"),
        ("rm", "nothing"),
        ("stop", "nothing"),
        ("invoke", "nothing"),
        ("snapshot", "rm", "f"),
    )
    for path in a.home.path.rglob("*"):  # what `ls` says of the disk is final when it is there
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    with_daemon = [command(a.home.path, *line) for line in lines]
    assert served.said().count(" refused ") == 4
    assert served.stop() == 0
    assert with_daemon == [command(a.home.path, *line) for line in lines]
    assert json.loads(with_daemon[2][1])[0]["kind"]


def test_no_daemon(tmp_path: Path) -> None:
    """A client without a daemon says so; a dead daemon's socket is no daemon."""
    with Client(tmp_path / "torpor.sock") as client, pytest.raises(HostUnfit, match="not answer"):
        client.functions()
    with pytest.raises(InvalidInput, match="not a daemon's address"):
        Client("localhost:1")


def test_killed_daemons_socket_is_in_nobodys_way(a: Furnished, served: DaemonProcess) -> None:
    """After SIGKILL commands work on the home again, and the next daemon starts."""
    served.kill()
    assert served.socket.exists()
    code, out, _ = command(a.home.path, "ls", "--json")
    assert code == 0
    assert len(json.loads(out)) == 2
    served.start()
    with served.client() as client:
        assert len(client.functions()) == 2


def test_one_daemon_a_home(a: Furnished, served: DaemonProcess) -> None:
    """A second one says who has the home, and the first one goes on."""
    code, _, err = command(a.home.path, "serve")
    assert code == 4
    assert "another daemon has the home" in err
    assert f"process {served.process.pid}" in err  # type: ignore[union-attr]
    with served.client() as client:
        assert len(client.functions()) == 2
