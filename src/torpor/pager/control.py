"""What a pager and its clients say to each other: a JSON object a line over a Unix socket.

A request is `{"op": name, ...}`, an answer `{"ok": {...}}` or `{"error": {...}}` with the fields of
`TorporError.to_dict`. One request at a time on a connection. The socket is in a directory of mode
0700: who can connect may read every snapshot of the node.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor import errors
from torpor.errors import InternalError, OutsideError, TorporError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LONGEST_LINE_BYTES: Final = 64 * 1024 * 1024
SOCKET_NAME: Final = "control"


class PagerGone(OutsideError):
    """The pager ended while it was asked something, or is not there."""

    exit_code = 17


class Line:
    """A connection that carries one JSON object a line. Belongs to one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._stream = connection.makefile("rwb")

    def send(self, message: dict[str, Any]) -> None:
        """Send one object. Raises PagerGone."""
        try:
            self._stream.write(msgspec.json.encode(message) + b"\n")
            self._stream.flush()
        except (OSError, ValueError) as error:
            raise PagerGone("the pager ended", reason=str(error)) from None

    def receive(self) -> dict[str, Any] | None:
        """The next object, None at the end. Raises PagerGone, InternalError for another text."""
        try:
            line = self._stream.readline(LONGEST_LINE_BYTES)
        except OSError as error:
            raise PagerGone("the pager ended", reason=str(error)) from None
        if not line.endswith(b"\n"):
            return None
        try:
            message: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise InternalError("the pager speaks another language", reason=str(error)) from None
        return message

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        """One request and its answer. Raises PagerGone, and the error that the pager answered."""
        self.send({"op": op, **arguments})
        answer = self.receive()
        if answer is None:
            raise PagerGone("the pager ended", reason=f"while it was asked to {op}")
        if "error" in answer:
            raise decode_error(answer["error"])
        result: dict[str, Any] = answer["ok"]
        return result

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._stream.close()
        self.connection.close()


def decode_error(fields: dict[str, Any]) -> TorporError:
    """The error of our tree that another process sent."""
    kind = getattr(errors, str(fields.get("error")), InternalError)
    if not (isinstance(kind, type) and issubclass(kind, TorporError)):
        kind = InternalError
    text = {name: str(fields.get(name, "")) for name in ("message", "reason", "hint")}
    return kind(text["message"], reason=text["reason"], hint=text["hint"])


def listen(directory: Path) -> socket.socket:
    """A listening socket in a directory, whose path may be longer than a socket's may."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(directory) as path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(directory: Path, *, timeout_s: float | None = None) -> Line:
    """A connection to the pager whose socket is in a directory. Raises PagerGone."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        with _short(directory) as path:
            connection.connect(path)
    except OSError as error:
        connection.close()
        raise PagerGone("no pager answers", reason=str(error)) from None
    return Line(connection)


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A path of the socket that fits into 108 bytes, by a descriptor of its directory."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)
