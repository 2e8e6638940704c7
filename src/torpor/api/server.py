"""The API's listeners: one HTTP server for each socket, whose signals are not its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import ClassVar, Final

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from torpor.api.problems import MEDIA_TYPE, problem_of
from torpor.errors import HostUnfit, InvalidInput

_LONGEST_PATH: Final = 107
_BACKLOG: Final = 128
_MOST_CONNECTIONS: Final = 1000


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """The command hears them."""
        yield


class _Connection(H11Protocol):
    """A connection that ends when a request's head is not there in time, or is no head."""

    head_s: ClassVar[float]
    _until: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, but a problem."""
        problem = problem_of(InvalidInput("this is no HTTP/1.1 request", reason=msg))
        body = msgspec.json.encode(problem)
        fields = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=problem.status, headers=fields, reason=problem.title)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._until is None:
            self._until = self.loop.call_later(self.head_s, self.transport.close)

    def _forget(self) -> None:
        if self._until is not None:
            self._until.cancel()
            self._until = None


class Listener:
    """Serves an application on one listening socket until it is stopped."""

    def __init__(
        self,
        app: ASGIApp,
        listening: socket.socket,
        *,
        drain_s: float,
        head_s: float,
        path: Path | None = None,
    ) -> None:
        """`head_s`: a request's head must arrive within this. `path` is that of a Unix socket."""
        config = uvicorn.Config(
            app,
            # h11 limits the size of a request's head
            http=type("Connection", (_Connection,), {"head_s": head_s}),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, int(drain_s)),
        )
        self._socket, self._path = listening, path
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where it listens: a path, or HOST:PORT."""
        if self._path is not None:
            return str(self._path)
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    async def start(self) -> None:
        """Serve from now on."""
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise HostUnfit(f"the API does not start on {self.address}")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Take nothing more, let what is under way end within `drain_s`. Idempotent."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.wait((self._serving,))
        self._socket.close()

    def hurry(self) -> None:
        """Do not wait for what is under way."""
        self._server.force_exit = True


def listen_unix(path: Path) -> socket.socket:
    """A listening socket for this user alone; it takes the place of a dead daemon's.

    The caller holds the home's daemon lock. Raises InvalidInput, HostUnfit.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH - 16:
        raise InvalidInput(
            f"the path {path} is too long for a socket", hint="set `socket` to a shorter one"
        )
    made = path.with_name(f"{path.name}.{os.getpid()}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.unlink(missing_ok=True)
        listening.bind(str(made))
        made.chmod(0o600)
        listening.listen(_BACKLOG)
        made.rename(path)  # it appears with its mode, and when it answers
    except OSError as error:
        listening.close()
        raise HostUnfit(f"cannot listen on {path}", reason=str(error)) from None
    return listening


def listen_tcp(address: str) -> socket.socket:
    """A listening socket on HOST:PORT. Raises HostUnfit."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, name = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(name)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise HostUnfit(
            f"the API cannot listen on {address}",
            reason=str(error),
            hint="name another address or port, or end what listens there",
        ) from None
    return listening
