"""Between a client and its HTTP library: where the daemon is, what was asked, what came back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from torpor.api.calls import Call
from torpor.api.problems import error_of
from torpor.api.streams import LINES
from torpor.config import load_settings
from torpor.errors import HostUnfit, InternalError, InvalidInput
from torpor.node.events import Event
from torpor.node.parts import Reporter
from torpor.structs import prepared

T = TypeVar("T")


@dataclass(frozen=True)
class Where:
    """Where a daemon listens: a Unix socket, or a URL with a token."""

    socket: Path | None
    url: str
    token: str | None

    @classmethod
    def find(cls, address: str | Path | None, token: str | None) -> Where:
        """From what a user gave: a path, an http:// URL, or nothing: the settings' socket.

        Raises InvalidInput.
        """
        if address is None:
            return cls(load_settings().socket_path(), "http://torpor", None)
        if isinstance(address, Path) or address.startswith("/"):
            return cls(Path(address), "http://torpor", None)
        if not address.startswith(("http://", "https://")):
            raise InvalidInput(
                f"not a daemon's address: {address!r}",
                hint="give the path of its socket, or http://HOST:PORT with its token",
            )
        return cls(None, address, token)

    def check(self) -> None:
        """Raises HostUnfit at once when there is no socket."""
        if self.socket is not None and not self.socket.is_socket():
            raise self.unreachable(httpx.ConnectError("there is no such socket"))

    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def unreachable(self, error: httpx.TransportError) -> HostUnfit:
        """The daemon does not answer, or stopped in the middle."""
        return HostUnfit(
            f"the daemon at {self.socket or self.url} does not answer",
            reason=str(error) or type(error).__name__,
            hint="start it with `torpor serve`",
        )


def request_of(call: Call[Any], *, lines: bool = False) -> dict[str, Any]:
    """The keyword arguments of httpx's request."""
    headers = {} if call.key is None else {"Idempotency-Key": call.key}
    if lines:
        headers["Accept"] = LINES
    asked: dict[str, Any] = {"method": call.method, "url": call.path, "headers": headers}
    if call.query:
        asked["params"] = call.query
    if call.body is not None:
        asked["json"] = call.body
    return asked


def refuse_problem(status: int, body: bytes) -> None:
    """Raise the error that an answer is, if it is one."""
    if status < 400:
        return
    try:
        data = msgspec.json.decode(body)
    except msgspec.DecodeError:
        data = None
    raise error_of(data, status=status)


def decode(call: Call[T], body: bytes) -> T:
    """The answer to a call. Raises InternalError for one that another version would send."""
    try:
        return msgspec.json.decode(body, type=prepared(call.answer))
    except msgspec.DecodeError as error:
        raise InternalError(
            "the daemon's answer is not understood",
            reason=str(error),
            hint="daemon and client should be of the same version",
        ) from None


class Lines:
    """The lines of an operation with progress: passes progress on, keeps the result."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._result: Any = None
        self.ended = False

    def take(self, line: str) -> None:
        """One line. Raises the error that ended the operation."""
        match msgspec.json.decode(line):
            case {"progress": {"say": text}}:
                self._reporter.say(text)
            case {"progress": {"what": what, "done_bytes": done, "total_bytes": total}}:
                self._reporter.step(what, done, total)
            case {"problem": problem}:
                raise error_of(problem, status=problem.get("status", 500))
            case {"result": result}:
                self._result, self.ended = result, True

    def result(self, call: Call[T]) -> T:
        """What it ended with. Raises HostUnfit when the daemon stopped before."""
        if not self.ended:
            raise HostUnfit("the daemon stopped before it was done", hint="see its log")
        return msgspec.convert(self._result, prepared(call.answer))


class LineSplitter:
    """Cuts bytes at line feeds, and only there: a JSON string may hold other line separators."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are whole by now, without empty ones."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line.decode() for line in whole if line]


def event_of(line: str) -> Event | None:
    """The event in a line of text/event-stream, None for the lines around it."""
    if not line.startswith("data: "):
        return None
    return msgspec.json.decode(line.removeprefix("data: "), type=prepared(Event))
