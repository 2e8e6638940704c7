"""The agent's side of the wire: lines, garbage, many clients."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torpor.image.agent import LINE_BYTES, ErrorReply, OkReply, decode_reply

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.guest.conftest import RunningAgent

CONNECTIONS_MAX = 16


def ask(connection: socket.socket, line: bytes) -> OkReply | ErrorReply:
    """Send bytes, read one reply line."""
    connection.sendall(line)
    return read_reply(connection)


def read_reply(connection: socket.socket) -> OkReply | ErrorReply:
    received = b""
    while not received.endswith(b"\n"):
        piece = connection.recv(1)
        assert piece, "the agent closed the connection"
        received += piece
    return decode_reply(received[:-1])


def is_pong(reply: OkReply | ErrorReply) -> bool:
    return isinstance(reply, OkReply) and reply.number("protocol") == 1


def test_ping_tells_protocol_and_kernel(agent: RunningAgent) -> None:
    """`ping` answers with the protocol's version and the kernel's release."""
    with agent.connect() as connection:
        reply = ask(connection, b"ping\n")
    assert isinstance(reply, OkReply)
    assert reply.number("protocol") == 1
    assert reply.text("kernel")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b" \n",
        b"nonsense\n",
        b"PING\n",
        b"ping extra\n",
        b"ping colour=red\n",
        b"run arg\n",
        b"run arg=%zz\n",
        b"run arg=%4\n",
        b"run arg=%00\n",
        b"run\n",
        b"run ARG=x\n",
        b"start arg=true port=0\n",
        b"start arg=true port=65536\n",
        b"start arg=true port=8080x\n",
        b"start arg=true\n",
        b"await port=80\n",
        b"await port=80 timeout_ms=10\n",
        b"await port=80 timeout_ms=-1\n",
        b"stop\n",
        b"clock\n",
        b"clock time_ns=-1\n",
        b"wake time_ns=1 entropy=00 hostname=h instance=i\n",
        b"wake time_ns=x entropy=" + b"00" * 32 + b" hostname=h instance=i\n",
        b"wake time_ns=1 entropy=" + b"0g" * 32 + b" hostname=h instance=i\n",
        b"wake time_ns=1 entropy=" + b"00" * 513 + b" hostname=h instance=i\n",
        b"wake time_ns=1 entropy=" + b"00" * 32 + b" hostname=" + b"h" * 65 + b" instance=i\n",
        b"wake time_ns=1 entropy=" + b"00" * 32 + b" hostname=h%0A instance=i\n",
        b"\x00\x00\n",
        bytes(range(11, 256)) + b"\n",
        b"run " + b"arg=a " * 2000 + b"\n",
    ],
)
def test_garbage_is_answered_by_an_error(agent: RunningAgent, line: bytes) -> None:
    """What is no request gets one error reply, and the same connection goes on."""
    with agent.connect() as connection:
        assert isinstance(ask(connection, line), ErrorReply)
        assert is_pong(ask(connection, b"ping\n"))


@pytest.mark.parametrize("size", [LINE_BYTES, LINE_BYTES + 1, 5 * LINE_BYTES])
def test_too_long_line_is_skipped(agent: RunningAgent, size: int) -> None:
    """A line over the limit gets one error, whatever its length, and the next line is read."""
    with agent.connect() as connection:
        reply = ask(connection, b"x" * size + b"\nping\n")
        assert isinstance(reply, ErrorReply)
        assert "longer than" in reply.message
        assert is_pong(read_reply(connection))


def test_longest_line_is_taken(agent: RunningAgent) -> None:
    """A request of just the limit, newline included, goes through whole."""
    start, end = b"run arg=/bin/sh arg=-c arg=exit%20$%7B%23X%7D env=X=", b"\n"
    with agent.connect() as connection:
        reply = ask(connection, start + b"y" * (LINE_BYTES - len(start) - 1) + end)
    assert isinstance(reply, OkReply), reply
    assert reply.number("status") == (LINE_BYTES - len(start) - 1) % 256


def test_requests_sent_at_once_are_answered_in_order(agent: RunningAgent) -> None:
    """Several lines in one packet, one split over packets: a reply each, in their order."""
    with agent.connect() as connection:
        connection.sendall(b"ping\nrun arg=/bin/false\nbad\npi")
        replies = [read_reply(connection) for _ in range(3)]
        connection.sendall(b"ng\n")
        assert is_pong(replies[0])
        assert replies[1] == OkReply((("status", b"1"),))
        assert isinstance(replies[2], ErrorReply)
        assert is_pong(read_reply(connection))


def test_half_closed_connection_still_gets_its_reply(agent: RunningAgent) -> None:
    """A client that sends no more gets the reply to what it sent, then the end."""
    with agent.connect() as connection:
        connection.sendall(b"run arg=/bin/true\n")
        connection.shutdown(socket.SHUT_WR)
        assert read_reply(connection) == OkReply((("status", b"0"),))
        assert connection.recv(1) == b""


def test_idle_connections_give_way(agent: RunningAgent) -> None:
    """Connections that nobody uses any more never keep a new one out."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(agent.connect()) for _ in range(3 * CONNECTIONS_MAX)]
        assert is_pong(ask(idle[-1], b"ping\n"))
        with agent.connect() as connection:
            assert is_pong(ask(connection, b"ping\n"))


def test_pending_requests_do_not_hold_up_others(agent: RunningAgent, tmp_path: Path) -> None:
    """While a `run` is under way, pings on other connections are answered; then it ends."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with agent.connect() as slow, agent.connect() as quick:
        slow.sendall(f"run arg=/bin/cat arg={gate}\n".encode())
        for _ in range(20):
            assert is_pong(ask(quick, b"ping\n"))
        refused = ask(quick, b"run arg=/bin/true\n")
        assert isinstance(refused, ErrorReply)
        assert "under way" in refused.message
        with gate.open("w"):
            pass
        assert read_reply(slow) == OkReply((("status", b"0"),))


def test_client_that_vanishes_leaves_the_agent_usable(agent: RunningAgent, tmp_path: Path) -> None:
    """A client may go away in the middle of its `run`; the next one finds the agent free."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with agent.connect() as vanishing:
        vanishing.sendall(f"run arg=/bin/cat arg={gate}\n".encode())
        with gate.open("w"):
            pass
    with agent.connect() as connection:
        reply = ask(connection, b"sync\n")
        assert reply == OkReply(())
        while isinstance(ask(connection, b"run arg=/bin/true\n"), ErrorReply):
            assert is_pong(ask(connection, b"ping\n"))


@pytest.mark.slow
def test_pending_awaits_give_way(agent: RunningAgent) -> None:
    """Clients that wait for a port, there or gone, never keep a new one out; the idle go first."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(agent.connect())
        assert isinstance(ask(first, b"start arg=sleep arg=1000 port=1\n"), OkReply)
        for number in range(CONNECTIONS_MAX):
            waiting = stack.enter_context(agent.connect())
            waiting.sendall(b"await port=1 timeout_ms=3600000\n")
            if number % 2:
                waiting.shutdown(socket.SHUT_WR)
        assert first.recv(1) == b""
        for _ in range(3):
            with agent.connect() as connection:
                assert is_pong(ask(connection, b"ping\n"))


def test_tasks_are_bounded_and_answered(agent: RunningAgent, tmp_path: Path) -> None:
    """With all tasks under way one more is refused, pings are answered, and then each is."""
    gates = [tmp_path / f"gate-{number}" for number in range(2)]
    for gate in gates:
        os.mkfifo(gate)
    hook = agent.root / "etc/torpor/wake.d/10-wait"
    hook.parent.mkdir(parents=True)
    hook.write_text(f"#!/bin/sh\nread line < {gates[1]}\n")
    hook.chmod(0o755)
    wake = b"wake time_ns=1 entropy=" + b"00" * 32 + b" hostname=h instance=i\n"
    with agent.connect() as slow, agent.connect() as waking, agent.connect() as quick:
        slow.sendall(f"run arg=/bin/cat arg={gates[0]}\n".encode())
        waking.sendall(wake)
        refused = ask(quick, wake)
        assert isinstance(refused, ErrorReply)
        assert "under way" in refused.message
        quick.sendall(b"sync\n" * 50 + b"ping\n")
        assert [read_reply(quick) for _ in range(50)] == [OkReply(())] * 50
        assert is_pong(read_reply(quick))
        for gate in gates:
            with gate.open("w") as opened:
                opened.write("go\n")
        assert read_reply(slow) == OkReply((("status", b"0"),))
        assert isinstance(read_reply(waking), OkReply)


def test_client_that_reads_nothing_holds_up_nobody(agent: RunningAgent) -> None:
    """Endless requests without reading a reply: that connection stalls, the others do not."""
    with agent.connect() as deaf, agent.connect() as other:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                deaf.sendall(b"nonsense\n" * 5000)
        for _ in range(20):
            assert is_pong(ask(other, b"ping\n"))


@given(st.lists(st.binary(max_size=300) | st.just(b"x" * LINE_BYTES), max_size=8), st.booleans())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_leave_the_agent_usable(
    agent: RunningAgent, pieces: list[bytes], half_closed: bool
) -> None:
    """Whatever a client sends, cut anywhere: one reply a line, the end, and the agent goes on."""
    text = b"\n".join(pieces)
    with agent.connect() as connection:
        connection.sendall(text)
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
            assert received.count(b"\n") == text.count(b"\n")
    with agent.connect() as connection:
        assert is_pong(ask(connection, b"ping\n"))
