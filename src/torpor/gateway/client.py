"""A client's connection: parses its requests, answers them in order, one at a time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

from torpor.gateway.body import Body
from torpor.gateway.heads import Header, RequestHead, check_request
from torpor.gateway.problems import Problem, Refused, malformed

if TYPE_CHECKING:
    from torpor.gateway.exchange import Exchange

log = logging.getLogger("torpor.gateway")

_LINGER_S: Final = 2.0
_MOST_FIELDS: Final = 256


@dataclass(frozen=True)
class Limits:
    """What a client may do. `keep_alive_s` is how long it may be silent between requests."""

    head_bytes: int = 64 * 1024
    body_bytes: int = 16 * 1024**3
    header_timeout_s: float = 10.0
    keep_alive_s: float = 75.0
    connections: int = 10_000


@dataclass(frozen=True)
class Incoming:
    """A request whose head has arrived."""

    head: RequestHead
    body: Body
    at: float


class Service(Protocol):
    """Who answers requests."""

    limits: Limits
    connections: set[ClientConnection]
    draining: bool

    async def answer(self, client: ClientConnection, incoming: Incoming) -> bool:
        """Answer one request; whether the connection may be used on. Raises nothing."""

    def count_refused(self, status: int) -> None:
        """A request was refused before it was one for a function."""


class ClientConnection(asyncio.Protocol):
    """One client. Belongs to the loop."""

    def __init__(self, service: Service) -> None:
        self.exchange: Exchange | None = None
        self.address = ""
        self.busy = False
        self.full = False
        """Whether the client does not take what is written to it."""
        self._service = service
        self._limits = service.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._queue: deque[Incoming] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self._current: Incoming | None = None
        self._failure: Problem | None = None
        self._holds: set[str] = set()
        self._mode = "requests"  # then tunnel or over
        self._early: list[bytes] = []
        self._begun = self._moved = False
        self._unseen_bytes = 0
        self._parser = httptools.HttpRequestParser(self)

    @property
    def draining(self) -> bool:
        """Whether this connection should end with its request."""
        return self._service.draining

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def hold(self, reason: str, wanted: bool) -> None:
        """Pause reading for a reason, or resume it when no reason is left."""
        before = bool(self._holds)
        (self._holds.add if wanted else self._holds.discard)(reason)
        if bool(self._holds) != before and not self._transport.is_closing():
            if self._holds:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def open_tunnel(self) -> None:
        """From here on bytes go through as they are."""
        self._mode = "tunnel"
        early, self._early = self._early, []
        for data in early:
            self._to_tunnel(data)

    def answer_problem(
        self, problem: Problem, *, request_id: bytes, method: bytes, keep_alive: bool
    ) -> None:
        """Answer in the gateway's own name."""
        body = problem.encode(request_id=request_id.decode("ascii"))
        lines = [
            b"HTTP/1.1 %d %b" % (problem.status, problem.title.encode()),
            b"Content-Type: application/problem+json",
            b"Content-Length: %d" % len(body),
            b"X-Request-Id: " + request_id,
            *(b"%b: %b" % header for header in problem.headers),
            b"Connection: keep-alive" if keep_alive else b"Connection: close",
        ]
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        self.write(head if method == b"HEAD" else head + body)

    def close(self) -> None:
        """End it; what was written goes out first."""
        self._mode = "over"
        self._transport.close()

    def abort(self) -> None:
        """End it so that the client sees that its response is not whole."""
        self._mode = "over"
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.address = str(transport.get_extra_info("peername")[0])
        others = self._service.connections
        others.add(self)
        if len(others) > self._limits.connections or self._service.draining:
            self._refuse(Problem(503, "overloaded", "this gateway has too many connections"))
            return
        self._expire_in(self._limits.header_timeout_s)
        self._task = self._loop.create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        match self._mode:
            case "tunnel":
                self._to_tunnel(data)
            case "requests":
                self._parse(data)
            case "upgrading":
                self._keep_early(data)

    def eof_received(self) -> None:
        """See asyncio.Protocol: a client that ends its side is taken to have left."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._mode = "over"
        self._cancel_timer()
        self._service.connections.discard(self)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self.full = True
        if self.exchange is not None:
            self.exchange.hold_response(True)

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self.full = False
        if self.exchange is not None:
            self.exchange.hold_response(False)

    # the parser's

    def on_message_begin(self) -> None:
        """A request begins."""
        self._target = b""
        self._headers: list[Header] = []
        self._head_bytes = 0
        self._in_head = self._begun = self._moved = True
        if not self.busy:
            self._expire_in(self._limits.header_timeout_s)

    def on_url(self, data: bytes) -> None:
        """The request target, or a piece of it."""
        self._target += data

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field; those after the head are trailers, which are not passed on."""
        self._head_bytes += len(name) + len(value)
        too_many = self._in_head and len(self._headers) >= _MOST_FIELDS
        if self._head_bytes > self._limits.head_bytes or too_many:
            raise _head_too_large(self._limits)
        if self._in_head:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._in_head = False
        parser = self._parser
        head = RequestHead(
            parser.get_method(),
            self._target,
            parser.get_http_version(),
            self._headers,
            parser.should_keep_alive() and parser.get_http_version() == "1.1",
            parser.should_upgrade(),
        )
        check_request(head)
        if len(self._target) + self._head_bytes > self._limits.head_bytes:
            raise _head_too_large(self._limits)
        length = head.get(b"content-length")
        if length is not None and int(length) > self._limits.body_bytes:
            raise _body_too_large(self._limits)
        self._current = Incoming(head, Body(self.hold), self._loop.time())
        self._queue.append(self._current)
        if self.busy or len(self._queue) > 1:
            self.hold("pipeline", True)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        assert self._current is not None
        self._moved = True
        if self._current.body.size_bytes + len(data) > self._limits.body_bytes:
            raise _body_too_large(self._limits)
        self._current.body.feed(data)

    def on_message_complete(self) -> None:
        """The request is complete."""
        assert self._current is not None
        self._begun = False
        self._current.body.end()

    # inside

    async def _serve(self) -> None:
        try:
            await self._serve_all()
        except Exception:  # ours: the client sees a broken connection, the log what happened
            log.exception("a client's connection is broken off")
            self.abort()

    async def _serve_all(self) -> None:
        """Answer what comes until the connection may not be used on."""
        while True:
            while not self._queue:
                if self._failure is not None:
                    self._refuse(self._failure)
                    return
                self._arrived = self._loop.create_future()
                await self._arrived
            self._cancel_timer()
            incoming = self._queue.popleft()
            self.busy = True
            usable = await self._service.answer(self, incoming)
            self.busy = False
            if self._mode == "upgrading":  # the function did not
                usable = False
            if not usable or self._service.draining:
                self._finish(linger=not incoming.body.ended)
                return
            if not self._queue:
                self.hold("pipeline", False)
                self._expire_in(
                    self._limits.header_timeout_s if self._begun else self._limits.keep_alive_s
                )

    def _parse(self, data: bytes) -> None:
        self._moved = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            cause = error.__context__
            while cause is not None and not isinstance(cause, Refused):
                cause = cause.__context__
            refused = cause or malformed(f"this is no HTTP/1.1 request: {error}")
            self._fail(refused.problem)
            return
        # the parser keeps a field, trailer or chunk extension until it is whole
        self._unseen_bytes = 0 if self._moved else self._unseen_bytes + len(data)
        if self._begun and self._unseen_bytes > self._limits.head_bytes:
            self._fail(_head_too_large(self._limits).problem)

    def _upgrade(self, rest: bytes) -> None:
        assert self._current is not None
        if self._current.head.websocket:
            self._mode = "upgrading"
            self._keep_early(rest)
            return
        self._parser = httptools.HttpRequestParser(self)  # no other protocol is spoken here
        if rest:
            self._parse(rest)

    def _keep_early(self, data: bytes) -> None:
        """What comes before the function has agreed to the upgrade."""
        if data:
            self._early.append(data)
            self.hold("upgrade", True)

    def _to_tunnel(self, data: bytes) -> None:
        self.hold("upgrade", False)
        if self.exchange is not None:
            self.exchange.tunnel(data)

    def _fail(self, problem: Problem) -> None:
        """What came is no request: answer what came before, then say so and end."""
        self._mode, self._failure = "over", problem
        unfinished = self._current is not None and not self._current.body.ended
        if unfinished and self._queue and self._queue[-1] is self._current:
            self._queue.pop()
        elif unfinished and self.busy:
            assert self._task is not None
            self._task.cancel()
            if self.exchange is None or not self.exchange.status:
                self._refuse(problem)
            else:
                self.abort()
            return
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _refuse(self, problem: Problem) -> None:
        self._service.count_refused(problem.status)
        self.answer_problem(problem, request_id=b"-", method=b"", keep_alive=False)
        self._finish(linger=True)

    def _finish(self, *, linger: bool) -> None:
        """Close; with `linger` read on for a while first.

        What is unread would reset the connection before the client has read its answer.
        """
        self._mode = "over"
        self._holds.clear()
        if linger and not self._transport.is_closing():
            self._transport.resume_reading()
            self._transport.write_eof()
            self._cancel_timer()
            self._timer = self._loop.call_later(_LINGER_S, self._transport.abort)
        else:
            self._transport.close()

    def _expire_in(self, seconds: float) -> None:
        self._cancel_timer()
        self._timer = self._loop.call_later(seconds, self._expire)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """The client was silent, or too slow with a head."""
        if self._begun:
            if self._task is not None:
                self._task.cancel()
            self._refuse(Problem(408, "request-timeout", "the head did not arrive in time"))
        else:
            self.close()


def _head_too_large(limits: Limits) -> Refused:
    return Refused(
        431, "head-too-large", f"a head has at most {limits.head_bytes} bytes and 256 fields"
    )


def _body_too_large(limits: Limits) -> Refused:
    return Refused(413, "body-too-large", f"a body has at most {limits.body_bytes} bytes")
