"""Firecracker's API: HTTP/1.1 with JSON over a Unix socket, one connection a request.

Encoding and decoding are pure; `Api` is the thin shell. Nothing is kept between requests, so a VM
can be left by one process of torpor and taken over by another; but for a connection while a capture
goes on, whose pause is shorter if it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor.errors import DeadlineExceeded, NoSpace, VmmFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.vmm.firecracker.requests import Request

_ANSWER_TIMEOUT_S: Final = 60.0
_LARGEST_HEAD: Final = 16 << 10
_LARGEST_BODY: Final = 1 << 20
_HEAD_END: Final = b"\r\n\r\n"
_NO_SPACE: Final = "No space left on device"


class ConnectionLost(VmmFailed):
    """There was no answer, or not all of one: the process may be ending."""


class RequestRefused(VmmFailed):
    """Firecracker answered that it will not; `reason` is its own words."""


@dataclass(frozen=True)
class Head:
    """The beginning of an answer: status and how many bytes follow."""

    status: int
    length: int


def encode_request(request: Request) -> bytes:
    """The bytes of a request."""
    body = b"" if request.body is None else msgspec.json.encode(request.body)
    lines = [f"{request.method} {request.path} HTTP/1.1", "Host: localhost"]
    lines += ["Accept: application/json"]
    if request.body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def decode_head(data: bytes) -> Head:
    """The head of an answer, with the empty line that ends it. Raises VmmFailed."""
    first, _, rest = data.partition(b"\r\n")
    words = first.split(b" ", 2)
    length = b"0"
    for line in rest.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = value.strip()
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise VmmFailed("Firecracker's answer is not HTTP", reason=repr(first[:80]))
    if not length.isdigit() or int(length) > _LARGEST_BODY:
        raise VmmFailed("Firecracker's answer has an impossible length", reason=repr(length[:80]))
    return Head(int(words[1]), int(length))


def decode_answer(request: Request, head: Head, body: bytes) -> Any:  # noqa: ANN401
    """What a request brought, None for an empty answer.

    Raises NoSpace or RequestRefused with Firecracker's own words when it refused.
    """
    try:
        content = msgspec.json.decode(body) if body else None
    except ValueError:  # msgspec's, and its UnicodeDecodeError
        content = body.decode(errors="replace")[:500]
    if 200 <= head.status < 300:
        return content
    words = content.get("fault_message") if isinstance(content, dict) else content
    error = NoSpace if _NO_SPACE in str(words) else RequestRefused
    raise error(f"Firecracker refused {request.name}", reason=str(words or f"status {head.status}"))


class Api:
    """The API of one Firecracker process at a socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: socket.socket | None = None

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Have all requests of the body on one connection. Raises ConnectionLost."""
        try:
            connection = connect(self._path)
        except OSError as error:
            raise ConnectionLost("cannot connect to Firecracker", reason=str(error)) from None
        with connection:
            self._kept = connection
            try:
                yield
            finally:
                self._kept = None

    async def ask(self, request: Request) -> Any:  # noqa: ANN401
        """Send one request and return what it answered.

        Raises RequestRefused, ConnectionLost when it cannot be reached, NoSpace, DeadlineExceeded.
        """
        try:
            # not asyncio.wait_for: Python 3.11's loses a cancellation that meets the answer
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await self._exchange(request)
        except TimeoutError:
            raise DeadlineExceeded(
                f"Firecracker did not answer {request.name} within {_ANSWER_TIMEOUT_S:.0f} s"
            ) from None
        except (OSError, EOFError) as error:
            raise ConnectionLost(
                f"lost the connection to Firecracker at {request.name}",
                reason=str(error) or type(error).__name__,
            ) from None

    def listens(self) -> bool:
        """Whether somebody listens at the socket."""
        try:
            connect(self._path).close()
        except OSError:
            return False
        return True

    async def _exchange(self, request: Request) -> Any:  # noqa: ANN401
        if self._kept is None:
            with connect(self._path) as connection:
                return decode_answer(request, *await _exchange_over(connection, request))
        connection, self._kept = self._kept, None  # lost, unless there is all of an answer
        head, body = await _exchange_over(connection, request)
        self._kept = connection
        return decode_answer(request, head, body)


async def _exchange_over(connection: socket.socket, request: Request) -> tuple[Head, bytes]:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, encode_request(request))
    data = bytearray()

    async def receive() -> None:
        piece = await loop.sock_recv(connection, _LARGEST_HEAD)
        if not piece:
            raise EOFError("it closed the connection")
        data.extend(piece)

    while (end := data.find(_HEAD_END)) < 0:
        if len(data) > _LARGEST_HEAD:
            raise EOFError(f"no end of an answer's head in {len(data)} bytes")
        await receive()
    end += len(_HEAD_END)
    head = decode_head(bytes(data[:end]))
    while len(data) < end + head.length:
        await receive()
    return head, bytes(data[end:])


def connect(path: Path) -> socket.socket:
    """A connection to a Unix socket whose path may be longer than an address can hold.

    A link in its place is not followed: Firecracker may own the directory.
    """
    place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"/proc/self/fd/{place}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(place)
    connection.setblocking(False)
    return connection
