"""A function without a VM, and clients with long bodies, each a process of its own.

    python -m torpor.bench.stub serve        prints its port, answers until its standard input ends
    python -m torpor.bench.stub fetch HOST PORT PATH BYTES    prints the seconds that it took
    python -m torpor.bench.stub send HOST PORT PATH BYTES     the same, of a body that is sent

`/stream/BYTES` is that many zeros, `/taken` how many bytes came with the request; any other path
answers `ok`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from typing import Final, cast

import httptools

_PIECE: Final = bytes(256 * 1024)
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_TAKEN: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n%020d"


class StubFunction(asyncio.Protocol):
    """One connection to the stub."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._left_bytes = self._taken_bytes = 0
        self._target = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._parser.feed_data(data)

    def on_url(self, target: bytes) -> None:
        """The parser's: what is asked for."""
        self._target, self._taken_bytes = target, 0

    def on_body(self, data: bytes) -> None:
        """The parser's: a piece of what is sent."""
        self._taken_bytes += len(data)

    def on_message_complete(self) -> None:
        """The parser's: answer."""
        if self._target == b"/taken":
            self._transport.write(_TAKEN % self._taken_bytes)
            return
        if not self._target.startswith(b"/stream/"):
            self._transport.write(_OK)
            return
        self._left_bytes = int(self._target.removeprefix(b"/stream/"))
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % self._left_bytes)
        self._full = False
        self.resume_writing()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._full = False
        while self._left_bytes and not self._full:
            piece = _PIECE[: self._left_bytes]
            self._left_bytes -= len(piece)
            self._transport.write(piece)


async def serve() -> None:
    """Answer until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(StubFunction, "127.0.0.1", 0)
    os.write(1, b"%d\n" % server.sockets[0].getsockname()[1])
    await asyncio.to_thread(sys.stdin.buffer.read)
    server.close()


def fetch(host: str, port: int, path: str, size_bytes: int) -> float:
    """Read a response with so large a body; the seconds. Raises ValueError for another one."""
    began = time.perf_counter()
    with socket.create_connection((host, port)) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        buffer = bytearray(1 << 20)
        head, total = b"", 0
        while count := connection.recv_into(buffer):
            if b"\r\n\r\n" not in head:
                head += buffer[:count]
                total = len(head.partition(b"\r\n\r\n")[2])
            else:
                total += count
    if not head.startswith(b"HTTP/1.1 200 ") or total != size_bytes:
        raise ValueError(f"{total} bytes of {size_bytes}, after {head[:80]!r}")
    return time.perf_counter() - began


def send(host: str, port: int, path: str, size_bytes: int) -> float:
    """Send a request with so large a body; the seconds to the whole answer. Raises ValueError."""
    began = time.perf_counter()
    with socket.create_connection((host, port)) as connection:
        request = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        connection.sendall(f"{request}Content-Length: {size_bytes}\r\n\r\n".encode())
        for at in range(0, size_bytes, len(_PIECE)):
            connection.sendall(_PIECE[: size_bytes - at])
        with connection.makefile("rb") as stream:
            answer = stream.read()
    if not answer.endswith(b"\r\n\r\n%020d" % size_bytes):
        raise ValueError(f"of {size_bytes} bytes: {answer[:500]!r}")
    return time.perf_counter() - began


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve())
    else:
        work = {"fetch": fetch, "send": send}[sys.argv[1]]
        took_s = work(sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
        os.write(1, f"{took_s:.6f}\n".encode())
