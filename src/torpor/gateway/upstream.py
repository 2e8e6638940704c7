"""A connection to an instance: writes one request at a time, reads its response."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

from torpor.errors import FunctionFailed
from torpor.gateway.heads import Header, ResponseHead, read_response

if TYPE_CHECKING:
    from torpor.gateway.pool import Member

_MOST_HEAD_BYTES: Final = 256 * 1024
_KEEP_IDLE_S: Final = 1.0
"""Shorter than any server's own limit: a request is never sent into a connection that closes."""


class Receiver(Protocol):
    """Who takes a response. Called in this order: interim heads, head, data, end, or a failure."""

    def on_interim(self, head: ResponseHead) -> None:
        """A 1xx response came before the real one."""

    def on_head(self, head: ResponseHead) -> None:
        """The response begins."""

    def on_data(self, data: bytes) -> None:
        """A piece of its body, or of the tunnel after a 101."""

    def on_end(self) -> None:
        """It is complete."""

    def on_failure(self, error: FunctionFailed) -> None:
        """It is not, and never will be."""

    def flush(self) -> None:
        """All that was read from the connection at once has been told."""

    def hold_client(self, wanted: bool) -> None:
        """Pause or resume what sends the request's body."""


class FunctionConnection(asyncio.Protocol):
    """One connection to an instance. Belongs to the loop."""

    def __init__(self) -> None:
        self.usable = True
        self._transport: asyncio.Transport
        self._receiver: Receiver | None = None
        self._loop = asyncio.get_running_loop()
        self._idle_since = 0.0
        self._tunnel = False
        self._new_parser()
        self._method = b""
        self._head: ResponseHead | None = None
        self._held = False

    @classmethod
    async def open(cls, address: str, port: int) -> FunctionConnection:
        """Connect. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, address, port)
        return connection

    @classmethod
    def take_idle(cls, member: Member) -> FunctionConnection | None:
        """A kept connection that is fresh enough, else None."""
        while member.idle:
            connection = member.idle.pop()
            age_s = connection._loop.time() - connection._idle_since
            if connection.usable and age_s < _KEEP_IDLE_S:
                return connection
            connection.close()
        return None

    def begin(self, receiver: Receiver, *, method: bytes, head: bytes) -> None:
        """Send the head of a request; its response goes to `receiver`."""
        self._receiver, self._method, self._head = receiver, method, None
        self._headers: list[Header] = []
        self._reason = b""
        self._head_bytes = 0
        self._transport.write(head)
        # a server that writes head and body apart would wait 40 ms in between for our delayed ACK
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def write(self, data: bytes) -> None:
        """Send a piece of the body or of the tunnel, framed already."""
        if self.usable:
            self._transport.write(data)

    def write_all(self, *pieces: bytes) -> None:
        """Send pieces together."""
        if self.usable:
            self._transport.writelines(pieces)

    def keep(self, member: Member) -> None:
        """Keep it for the member's next request, if it may be used again."""
        self._receiver = None
        if self.usable and not member.retired and self._head is not None and self._head.keep_alive:
            self._idle_since = self._loop.time()
            self.hold(False)
            member.idle.append(self)
        else:
            self.close()

    def hold(self, wanted: bool) -> None:
        """Pause or resume reading."""
        if wanted != self._held and not self._transport.is_closing():
            self._held = wanted
            if wanted:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def close(self) -> None:
        """End it; what was written still goes out."""
        self.usable, self._receiver = False, None
        self._transport.close()

    def abort(self) -> None:
        """End it at once: the function sees that nobody waits any more."""
        self.usable, self._receiver = False, None
        self._transport.abort()

    def give_up(self, why: str) -> None:
        """Nothing more will come: the request under way fails."""
        self._fail("the function's connection ended before its answer was complete", why)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        receiver = self._receiver
        if self._tunnel:
            if receiver is not None:
                receiver.on_data(data)
                receiver.flush()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._tunnel = True
            rest = data[upgrade.args[0] :]
            if receiver is not None and rest:
                receiver.on_data(rest)
        except httptools.HttpParserError as error:
            self._fail("the function's answer is no HTTP", str(error.__context__ or error))
            return
        if self._head is None:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES and self._receiver is not None:
                self._fail("the function's answer has too large a head", "")
                return
        if receiver is not None:
            receiver.flush()

    def eof_received(self) -> None:
        """See asyncio.Protocol."""
        self._ended("it closed the connection")

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._ended(str(exc) if exc else "the connection is closed")

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        if self._receiver is not None:
            self._receiver.hold_client(True)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if self._receiver is not None:
            self._receiver.hold_client(False)

    # the parser's

    def on_message_begin(self) -> None:
        """A response begins."""
        if self._receiver is None:
            raise ValueError("nobody asked for this response")

    def on_status(self, reason: bytes) -> None:
        """The reason phrase, or a piece of it."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field; those after the head are trailers, which are not passed on."""
        if self._head is None:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        receiver, status = self._receiver, self._parser.get_status_code()
        if receiver is None:
            raise ValueError("nobody asked for this response")
        head = read_response(
            status,
            self._reason,
            self._headers,
            version=self._parser.get_http_version(),
            method=self._method,
        )
        if 100 <= status < 200 and status != 101:
            self._headers, self._reason = [], b""
            receiver.on_interim(head)
            return
        self._head = head
        receiver.on_head(head)
        if self._method == b"HEAD":  # the parser would wait for a body
            self._new_parser()
            self._complete()

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if self._receiver is not None:
            self._receiver.on_data(data)
        else:  # behind the response to a HEAD
            self.usable = False

    def on_message_complete(self) -> None:
        """The response is complete, or it was an interim one."""
        if self._head is not None and self._head.status != 101:
            self._complete()

    def _complete(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.on_end()

    def _ended(self, why: str) -> None:
        self.usable = False
        head = self._head
        if head is not None and (head.status == 101 or head.framing == "close"):
            self._complete()
        else:
            self._fail("the function's connection ended before its answer was complete", why)

    def _fail(self, message: str, reason: str) -> None:
        self.usable = False
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.on_failure(FunctionFailed(message, reason=reason))
        self._transport.abort()

    def _new_parser(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
