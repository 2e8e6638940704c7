"""The agent inside a guest, spoken to over one TCP connection.

`docs/guest-protocol.md` fixes the protocol. The first half of this module turns requests and
replies into lines and back without any IO; `AgentClient` is the thin blocking shell around it.
"""

from __future__ import annotations

import os
import re
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import quote_from_bytes

from torpor.errors import Damaged, FunctionFailed, GuestFailed, InvalidInput
from torpor.host.cancel import Cancelled, current_token

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

AGENT_PORT: Final = 1024
PROTOCOL_VERSION: Final = 1
LINE_BYTES: Final = 65536
"""The longest line, with its newline, in either direction."""

_ANSWER_MARGIN_S = 5.0  # for the reply to a request that has a deadline of its own in the guest
_SAFE = "/:,@+"
_WORD = re.compile(rb"[a-z0-9_]+")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")

FunctionState = Literal["none", "running", "exited"]
Fields = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Request:
    """What the agent is asked to do. Keys may repeat; their order is kept."""

    verb: str
    fields: Fields = ()


@dataclass(frozen=True)
class OkReply:
    """The request was done."""

    fields: Fields = ()

    def text(self, key: str) -> str:
        """The value of a field. Raises GuestFailed if the reply has none."""
        for name, value in self.fields:
            if name == key:
                return os.fsdecode(value)
        raise GuestFailed(f"the agent's reply has no {key}")

    def number(self, key: str) -> int:
        """The value of a field as a whole number. Raises GuestFailed."""
        text = self.text(key)
        if not re.fullmatch(r"\d{1,20}", text, re.ASCII):
            raise GuestFailed(f"the agent's reply has {key}={text[:40]!r}")
        return int(text)

    def has(self, key: str) -> bool:
        """Whether the reply has such a field."""
        return any(name == key for name, _ in self.fields)


@dataclass(frozen=True)
class ErrorReply:
    """The request failed; `fault` says whose fault it is."""

    message: str
    fault: Literal["guest", "function"] = "guest"


def encode_request(request: Request) -> bytes:
    """The line, with its newline. Raises InvalidInput when it is longer than LINE_BYTES."""
    line = _encode_line(request.verb, request.fields)
    if len(line) > LINE_BYTES:
        raise InvalidInput(
            "command and environment are too long for the guest",
            reason=f"{len(line)} bytes when encoded, the limit is {LINE_BYTES}",
        )
    return line


def decode_request(line: bytes) -> Request:
    """The request in a line without its newline. Raises Damaged."""
    verb, fields = _decode_line(line)
    return Request(verb, fields)


def encode_reply(reply: OkReply | ErrorReply) -> bytes:
    """The line, with its newline."""
    if isinstance(reply, OkReply):
        return _encode_line("ok", reply.fields)
    fault = " fault=function" if reply.fault == "function" else ""
    return f"error {_encode_value(os.fsencode(reply.message))}{fault}\n".encode()


def decode_reply(line: bytes) -> OkReply | ErrorReply:
    """The reply in a line without its newline. Raises Damaged."""
    if line == b"error" or line.startswith(b"error "):
        message, _, rest = line[6:].partition(b" ")
        faulty = (b"fault", b"function") in [tuple(pair.split(b"=")) for pair in rest.split()]
        return ErrorReply(os.fsdecode(_decode_value(message)), "function" if faulty else "guest")
    verb, fields = _decode_line(line)
    if verb != "ok":
        raise Damaged(f"not a reply of the agent: {line[:40]!r}")
    return OkReply(fields)


def _encode_value(value: bytes) -> str:
    return quote_from_bytes(value, safe=_SAFE)


def _encode_line(verb: str, fields: Fields) -> bytes:
    pairs = [f" {key}={_encode_value(value)}" for key, value in fields]
    return f"{verb}{''.join(pairs)}\n".encode()


def _decode_value(text: bytes) -> bytes:
    def unescape(found: re.Match[bytes]) -> bytes:
        if found[1] is None:
            raise Damaged(f"broken escape in {text[:40]!r}")
        return bytes.fromhex(found[1].decode())

    return _ESCAPE.sub(unescape, text)


def _decode_word(text: bytes) -> str:
    if not _WORD.fullmatch(text):
        raise Damaged(f"not a word: {text[:40]!r}")
    return text.decode()


def _decode_line(line: bytes) -> tuple[str, Fields]:
    verb, *pairs = line.split(b" ")
    fields = []
    for pair in filter(None, pairs):
        key, equals, value = pair.partition(b"=")
        if not equals:
            raise Damaged(f"not a key=value pair: {pair[:40]!r}")
        fields.append((_decode_word(key), _decode_value(value)))
    return _decode_word(verb), tuple(fields)


@dataclass(frozen=True)
class Pong:
    """Which agent answers, and the release of the kernel it runs on."""

    protocol: int
    kernel: str


@dataclass(frozen=True)
class Ending:
    """How a process ended: by exit with `status`, or by `signal`; the other is None."""

    status: int | None = None
    signal: int | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it exited with status 0."""
        return self.status == 0

    def __str__(self) -> str:
        return f"signal {self.signal}" if self.status is None else f"status {self.status}"


@dataclass(frozen=True)
class Stats:
    """The guest's own view of itself. `ending` is set when `function` is "exited"."""

    uptime_ms: int
    clock_ns: int
    memory_total_bytes: int
    memory_free_bytes: int
    function: FunctionState
    pid: int | None
    ending: Ending | None


class AgentClient:
    """Requests to one agent over a connected socket, which stays the caller's.

    Blocking; one thread at a time. Each request has `timeout_s` for its reply, plus the time that
    the request itself may take in the guest. Every method raises GuestFailed when the connection
    breaks, the reply is late or makes no sense, or the agent reports an error; FunctionFailed when
    the agent says that the function's own code is at fault; InvalidInput when the request is too
    long. Stops when the work that it is part of is cancelled (`host.cancel`). After a failure
    other than an error reply the connection is of no more use.
    """

    def __init__(self, connection: socket.socket, *, timeout_s: float) -> None:
        self._socket = connection
        self._timeout_s = timeout_s
        connection.setblocking(False)

    def ping(self) -> Pong:
        """Ask who is there."""
        reply = self._ask("ping")
        return Pong(reply.number("protocol"), reply.text("kernel"))

    def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout_s: float,
    ) -> Ending:
        """Run a command in the image's root to its end; only before `start`."""
        fields = _command_fields(argv, env, cwd)
        return _ending(self._ask("run", fields, work_s=timeout_s))

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        port: int,
    ) -> int:
        """Mount the app and start the function with PORT set; its pid in the guest.

        FunctionFailed when the command cannot be executed.
        """
        fields = [*_command_fields(argv, env, cwd), ("port", str(port))]
        return self._ask("start", fields).number("pid")

    def await_listening(self, port: int, *, timeout_s: float) -> None:
        """Wait until the port can be reached from outside the guest.

        FunctionFailed when the function exited, or does not listen within `timeout_s`.
        """
        fields = [("port", str(port)), ("timeout_ms", str(int(timeout_s * 1000)))]
        self._ask("await", fields, work_s=timeout_s)

    def wake(self, *, time_ns: int, entropy: bytes, hostname: str, instance_id: str) -> None:
        """Set the clock, mix 16 to 512 bytes of entropy, name the guest, run its wake hooks.

        `time_ns` is nanoseconds since the epoch. FunctionFailed when a hook fails.
        """
        self._ask(
            "wake",
            [
                ("time_ns", str(time_ns)),
                ("entropy", entropy.hex()),
                ("hostname", hostname),
                ("instance", instance_id),
            ],
        )

    def set_clock(self, *, time_ns: int) -> bool:
        """Set the clock again; whether it was: the agent in an older snapshot cannot."""
        try:
            self._ask("clock", [("time_ns", str(time_ns))])
        except GuestFailed as error:
            if error.reason.startswith("unknown request"):
                return False
            raise
        return True

    def sync(self) -> None:
        """Write everything that is dirty to the scratch disk."""
        self._ask("sync")

    def stop(self, *, timeout_s: float) -> None:
        """End all processes of the guest and unmount the scratch disk, for good.

        They get SIGTERM, and SIGKILL after `timeout_s`.
        """
        self._ask("stop", [("timeout_ms", str(int(timeout_s * 1000)))], work_s=timeout_s)

    def stats(self) -> Stats:
        """Uptime, clock, memory, and what the function does."""
        reply = self._ask("stats")
        state = _function_state(reply.text("function"))
        return Stats(
            uptime_ms=reply.number("uptime_ms"),
            clock_ns=reply.number("clock_ns"),
            memory_total_bytes=reply.number("memory_total_bytes"),
            memory_free_bytes=reply.number("memory_free_bytes"),
            function=state,
            pid=reply.number("pid") if state == "running" else None,
            ending=_ending(reply) if state == "exited" else None,
        )

    def _ask(
        self, verb: str, fields: Sequence[tuple[str, str]] = (), *, work_s: float | None = None
    ) -> OkReply:
        """One exchange; `work_s` is what the guest may take before it must reply."""
        timeout_s = self._timeout_s if work_s is None else work_s + _ANSWER_MARGIN_S
        request = Request(verb, tuple((key, os.fsencode(value)) for key, value in fields))
        line = encode_request(request)
        try:
            reply = decode_reply(self._exchange(line, verb, timeout_s))
        except OSError as error:
            raise GuestFailed(
                f"connection to the agent broke at {verb}", reason=str(error)
            ) from None
        except Damaged as error:
            raise GuestFailed(
                f"the agent's reply to {verb} makes no sense", reason=str(error)
            ) from None
        if isinstance(reply, OkReply):
            return reply
        if reply.fault == "function":
            raise FunctionFailed(reply.message)
        raise GuestFailed(f"the agent refused {verb}", reason=reply.message)

    def _exchange(self, line: bytes, verb: str, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while line:
            self._wait(select.POLLOUT, verb, deadline, timeout_s)
            line = line[self._socket.send(line) :]
        received = bytearray()
        while not received.endswith(b"\n"):
            self._wait(select.POLLIN, verb, deadline, timeout_s)
            piece = self._socket.recv(LINE_BYTES)
            if not piece:
                raise GuestFailed(f"the agent closed the connection at {verb}")
            received += piece
            if len(received) > LINE_BYTES:
                raise GuestFailed(f"the agent's reply to {verb} has no end")
        return bytes(received[:-1])

    def _wait(self, event: int, verb: str, deadline: float, timeout_s: float) -> None:
        """Until the socket is ready. Raises Cancelled when the work was cancelled."""
        poller = select.poll()
        poller.register(self._socket, event)
        token = current_token()
        if token is not None:
            poller.register(token.fd, select.POLLIN)
        ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if token is not None and token.is_set():
            raise Cancelled
        if not ready:
            raise GuestFailed(f"the agent did not answer {verb} within {timeout_s:g} s")


def _command_fields(
    argv: Sequence[str], env: Mapping[str, str] | None, cwd: str | None
) -> list[tuple[str, str]]:
    fields = [("arg", word) for word in argv]
    fields += [("env", f"{name}={value}") for name, value in (env or {}).items()]
    return [*fields, ("cwd", cwd)] if cwd else fields


def _function_state(text: str) -> FunctionState:
    match text:
        case "none" | "running" | "exited":
            return text
        case _:
            raise GuestFailed(f"the agent's reply has function={text[:40]!r}")


def _ending(reply: OkReply) -> Ending:
    if reply.has("signal"):
        return Ending(signal=reply.number("signal"))
    return Ending(status=reply.number("status"))
