"""The pager's process: serves the mount and answers its clients until it is told to end.

The main thread does nothing but wait for a signal: its end tells the keeper that the process was
killed, even while other threads are stuck in the kernel (see `host.fuse.connection.wait_dying`).
"""

from __future__ import annotations

import array
import base64
import logging
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor.errors import InternalError, InvalidInput, TorporError
from torpor.host.fuse.server import Server
from torpor.pager.control import Line, PagerGone
from torpor.pager.pager import Limits, Pager
from torpor.pager.registry import Registry
from torpor.pager.source import Source
from torpor.pager.waits import Waits, WatchedFiles
from torpor.snapshot.local import LocalSnapshots
from torpor.structs import prepared
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torpor.host.fuse.connection import Connection

_WORKERS: Final = 16
_ENDING: Final = {signal.SIGTERM, signal.SIGINT}
_FULL_S: Final = 0.1

log = logging.getLogger("torpor.pager")


def serve(
    connection: Connection,
    listener: socket.socket,
    home: Path,
    limits: Limits,
    *,
    take_over: bool,
    trace: Callable[[str], None] = lambda place: None,
) -> None:
    """Be the pager of a home until a client asks to stop or SIGTERM comes; then return.

    With `take_over` another pager died before: what it served is served on, what it left
    unanswered is answered. `trace` is told of named places, for tests that kill there.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # for all threads: the main one takes them
    files = WatchedFiles()
    server = Server(
        connection, files, workers=_WORKERS, trace=lambda place, header: trace(f"fuse {place}")
    )
    pager = Pager(home, server, files, limits, predecessor_died=take_over, trace=trace)
    pager.recover()
    if take_over:
        LocalSnapshots(home / "snapshots").sweep()  # what it was about to publish
        server.take_over()
    else:
        server.start()
    threading.Thread(target=_end_with, args=(server,), name="mount", daemon=True).start()
    waits = Waits(files, Registry(home / "pager" / "open"))
    _Clients(pager, connection, listener, waits, trace).start()
    signal.sigwait(_ENDING)


def _end_with(server: Server) -> None:
    """Without its mount a pager is of no use, whoever unmounted it."""
    server.wait()
    _ask_to_end()


def _ask_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class _Clients:
    """Accepts clients and answers each in a thread of its own."""

    def __init__(
        self,
        pager: Pager,
        connection: Connection,
        listener: socket.socket,
        waits: Waits,
        trace: Callable[[str], None],
    ) -> None:
        self._pager = pager
        self._connection = connection
        self._listener = listener
        self._trace = trace
        self._ops: dict[str, Callable[..., dict[str, Any]]] = {
            "hello": self._hello,
            "begin": self._begin,
            "complete": pager.complete,
            "prepare": lambda source: pager.prepare(msgspec.convert(source, prepared(Source))),
            "go": pager.go,
            "wait_pushed": pager.wait_pushed,
            "hydrate": pager.hydrate,
            "wait_hydrated": pager.wait_hydrated,
            "close": pager.close,
            "failure": lambda digest: pager.failure(digest) | {"waiting": waits.longest(digest)},
            "opened": pager.opened,
            "counters": pager.counters,
            "stop": self._stop,
        }

    def start(self) -> None:
        """Accept in the background."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # no descriptor is free
                log.error("a client has to wait error=%s", error)
                time.sleep(_FULL_S)
                continue
            threading.Thread(
                target=self._talk, args=(connection,), name="client", daemon=True
            ).start()

    def _talk(self, connection: socket.socket) -> None:
        line = Line(connection)
        try:
            while (request := line.receive()) is not None:
                op = request.pop("op", None)
                self._trace(f"asked {op}")
                answer = self._answer(op, request, connection)
                self._trace(f"answering {op}")
                line.send(answer)
        except (PagerGone, InternalError) as error:
            log.info("client gone error=%s", error)
        finally:
            line.close()

    def _answer(
        self, op: object, request: dict[str, Any], connection: socket.socket
    ) -> dict[str, Any]:
        try:
            if op == "descriptors":
                return {"ok": self._pass_descriptors(connection)}
            work = self._ops.get(str(op))
            if work is None:
                raise InvalidInput(f"the pager cannot {str(op)[:40]!r}")
            return {"ok": work(**request)}
        except TorporError as error:
            return {"error": error.to_dict()}
        except Exception as error:
            log.exception("%s failed", op)
            failure = InternalError(f"the pager failed to {op}", reason=repr(error))
            return {"error": failure.to_dict()}

    def _hello(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "resend": self._connection.negotiated.has_resend}

    def _begin(
        self,
        reference: str,
        source: dict[str, Any],
        expect: str | None,
        here: list[str],
        push: bool,
        ref: str = "",
    ) -> dict[str, Any]:
        return self._pager.begin(
            reference,
            msgspec.convert(source, prepared(Source)),
            expect=None if expect is None else Digest(expect),
            here=here,
            push=push,
            ref=base64.b64decode(ref),
        )

    def _stop(self) -> dict[str, Any]:
        _ask_to_end()
        return {}

    def _pass_descriptors(self, connection: socket.socket) -> dict[str, Any]:
        """Hand the mount and the listening socket to a new keeper (SCM_RIGHTS, unix(7))."""
        numbers = array.array("i", [*self._connection.descriptors, self._listener.fileno()])
        socket.send_fds(connection, [b"\n"], list(numbers))
        return {"connection": self._connection.describe()}
