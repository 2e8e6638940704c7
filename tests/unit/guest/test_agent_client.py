"""The client against agents that misbehave, each a scripted socket."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

import pytest

from torpor.errors import FunctionFailed, GuestFailed, InvalidInput
from torpor.host.cancel import in_thread
from torpor.image.agent import (
    AgentClient,
    ErrorReply,
    OkReply,
    decode_request,
    encode_reply,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ends() -> Iterator[tuple[AgentClient, socket.socket]]:
    """A client and the agent's end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield AgentClient(ours, timeout_s=0.2), theirs


def test_request_on_the_wire(ends: tuple[AgentClient, socket.socket]) -> None:
    """A start carries arguments, environment, directory and port, and gives the pid."""
    client, agent = ends
    agent.sendall(b"ok pid=42\n")
    assert client.start(["a b", ""], env={"K": "V=1"}, cwd="/srv", port=80) == 42
    request = decode_request(agent.recv(65536).rstrip(b"\n"))
    assert request.verb == "start"
    assert request.fields == (
        ("arg", b"a b"),
        ("arg", b""),
        ("env", b"K=V=1"),
        ("cwd", b"/srv"),
        ("port", b"80"),
    )


def test_error_replies_tell_whose_fault_it_is(ends: tuple[AgentClient, socket.socket]) -> None:
    """An error is GuestFailed unless the agent says that it is the function's."""
    client, agent = ends
    agent.sendall(encode_reply(ErrorReply("disk on fire")))
    with pytest.raises(GuestFailed, match="refused sync: disk on fire"):
        client.sync()
    agent.sendall(encode_reply(ErrorReply("nothing listens", "function")))
    with pytest.raises(FunctionFailed, match="nothing listens"):
        client.await_listening(80, timeout_s=1)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"yes\n",
        b"ok\n",
        b"ok protocol=one kernel=k\n",
        b"ok protocol=1\n",
        b"ok protocol=%zz\n",
        b"\xff\xfe\n",
        b"error %\n",
        b"x" * 70_000,
    ],
)
def test_senseless_reply(ends: tuple[AgentClient, socket.socket], line: bytes) -> None:
    """A reply that cannot be understood is GuestFailed."""
    client, agent = ends
    agent.sendall(line)
    with pytest.raises(GuestFailed):
        client.ping()


def test_closed_connection(ends: tuple[AgentClient, socket.socket]) -> None:
    """An agent that goes away, with or without half a reply, is GuestFailed."""
    client, agent = ends
    agent.sendall(b"ok proto")
    agent.close()
    with pytest.raises(GuestFailed, match="ping"):
        client.ping()


def test_silent_agent(ends: tuple[AgentClient, socket.socket]) -> None:
    """No reply within the deadline is GuestFailed, and not long after the deadline."""
    client, _ = ends
    began = time.monotonic()
    with pytest.raises(GuestFailed, match=r"did not answer ping within 0\.2 s"):
        client.ping()
    assert time.monotonic() - began < 5


def test_too_long_request_is_never_sent(ends: tuple[AgentClient, socket.socket]) -> None:
    """A command over the protocol's limit is the caller's error and leaves the wire clean."""
    client, agent = ends
    with pytest.raises(InvalidInput, match="too long"):
        client.run(["x" * 70_000], timeout_s=1)
    agent.sendall(encode_reply(OkReply((("protocol", b"1"), ("kernel", b"6.1")))))
    assert client.ping().kernel == "6.1"


async def test_cancelled_work_stops_waiting(ends: tuple[AgentClient, socket.socket]) -> None:
    """A request under way ends at once when its asyncio caller is cancelled."""
    client, agent = ends
    work = asyncio.ensure_future(in_thread(lambda: client.run(["sleep"], timeout_s=1000)))
    await asyncio.to_thread(agent.recv, 100)
    work.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert time.monotonic() - began < 5
