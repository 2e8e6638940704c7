"""A server in front of a server: each GET reaches it so much later. As a link with that latency.

`python -m torpor.bench.late ADDRESS PORT UPSTREAM_PORT DELAY_S` serves until it is killed;
it prints a line when it listens. Two threads a connection; what is not a GET passes at once.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit
from torpor.host.process import spawn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PIECE_BYTES: Final = 256 * 1024
_READY_WITHIN_S: Final = 20.0
_PORT: Final = 9001


@dataclass(frozen=True)
class Late:
    """Where the late server listens, and by how much a GET is late."""

    endpoint: str
    delay_s: float


@contextlib.contextmanager
def late_server(
    directory: Path, *, namespace: Path, address: str, upstream_port: int, delay_s: float
) -> Iterator[Late]:
    """Serve inside `namespace`; killed after the body. Raises HostUnfit when it does not start."""
    log = directory / "late.log"
    arguments = [address, str(_PORT), str(upstream_port), str(delay_s)]
    process = spawn(
        [
            *("setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={namespace}"),
            *(sys.executable, "-m", "torpor.bench.late", *arguments),
        ],
        log=log,
        cwd=directory,
    )
    try:
        deadline = time.monotonic() + _READY_WITHIN_S
        while b"listening" not in log.read_bytes():
            if process.wait(timeout_s=0.02) or time.monotonic() > deadline:
                raise HostUnfit("the late server did not start", reason=log.read_text())
        yield Late(f"http://{address}:{_PORT}", delay_s)
    finally:
        process.kill()


def serve(address: str, port: int, upstream_port: int, delay_s: float) -> None:
    """Accept until killed."""
    with socket.create_server((address, port), backlog=128) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            client, _ = server.accept()
            upstream = socket.create_connection((address, upstream_port))
            for each in (client, upstream):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, target, wait_s in ((client, upstream, delay_s), (upstream, client, 0.0)):
                threading.Thread(target=_copy, args=(source, target, wait_s), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket, wait_s: float) -> None:
    """Pass bytes on; a piece that begins with a GET request waits first."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with contextlib.suppress(OSError):
        while length := source.recv_into(buffer):
            if wait_s and bytes(buffer[:4]) == b"GET ":
                time.sleep(wait_s)
            target.sendall(buffer[:length])
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
