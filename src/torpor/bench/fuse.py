"""What a mount costs: reading through it, pushing into it, one miss of the page cache.

`python -m torpor.bench.fuse [ROUNDS]` prints the report as one JSON object. The file's bytes are in
the server's memory, so this is the protocol, the kernel and Python, without cache, store or keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.bench.report import Report, host_parameters
from torpor.host.fuse import answers
from torpor.host.fuse.connection import Connection
from torpor.host.fuse.files import Call, Data, Node, Tree
from torpor.host.fuse.server import Server
from torpor.host.process import spawn
from torpor.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILE_BYTES: Final = 256 * MiB
_PIECE_BYTES: Final = MiB
_WINDOW_BYTES: Final = 16 * KiB
_MISSES: Final = 64
_WORKERS: Final = 4


class _MemoryFiles(Tree):
    """Files of the same random mebibyte over and over."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = memoryview(os.urandom(2 * MiB))

    def read(self, node: Node, offset: int, length: int, call: Call, /) -> Data:
        return self._bytes[offset % MiB :][:length]


def bench_fuse(*, runs: int) -> Report:
    """Each round: drop the file's pages, read it through, drop, push it, drop, miss windows.

    Blocking. The server is a process of its own; raises HostUnfit where nothing can be mounted.
    """
    report = Report("fuse", {**host_parameters(), "file_bytes": _FILE_BYTES, "runs": runs})
    with _mounted() as (connection, path, node):
        for _ in range(runs):
            _drop(connection, node)
            report.add("sequential read", _read_rate(path), "B/s")
            _drop(connection, node)
            report.add("push", _push_rate(connection, node), "B/s")
            for name, length in (("window", _WINDOW_BYTES), ("mebibyte", _PIECE_BYTES)):
                _drop(connection, node)
                for latency_s in _miss_latencies(path, length):
                    report.add(f"miss of one {name}", latency_s, "s")
    return report


@contextlib.contextmanager
def _mounted() -> Iterator[tuple[Connection, Path, Node]]:
    with tempfile.TemporaryDirectory(prefix="torpor-bench-") as name:
        directory = Path(name)
        mount_point = directory / "mount"
        mount_point.mkdir()
        connection = Connection.mount(mount_point)
        server = spawn(
            [sys.executable, "-m", "torpor.bench.fuse", "--serve", connection.describe()],
            log=directory / "log",
            pass_fds=connection.descriptors,
        )
        try:
            path = mount_point / "memory"
            os.stat(path)  # waits for the server; from now on the kernel knows the node
            yield connection, path, _files()[1]
        finally:
            connection.unmount()
            server.kill()


def _files() -> tuple[_MemoryFiles, Node]:
    files = _MemoryFiles()
    return files, files.add(["memory"], size_bytes=_FILE_BYTES)


def _serve(text: str) -> None:
    server = Server(Connection.adopt(text), _files()[0], workers=_WORKERS)
    server.start()
    server.wait()


def _drop(connection: Connection, node: Node) -> None:
    os.writev(connection.descriptors[0], answers.encode_invalidate_inode(node))


def _read_rate(path: Path) -> float:
    buffer = bytearray(_PIECE_BYTES)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return _FILE_BYTES / (time.perf_counter() - begin)


def _push_rate(connection: Connection, node: Node) -> float:
    data = os.urandom(_PIECE_BYTES)
    begin = time.perf_counter()
    for offset in range(0, _FILE_BYTES, _PIECE_BYTES):
        os.writev(connection.descriptors[0], answers.encode_store(node, offset, [data]))
    return _FILE_BYTES / (time.perf_counter() - begin)


def _miss_latencies(path: Path, length: int) -> Iterator[float]:
    """Reads of one length, spread over the file, without read-ahead."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        buffer = bytearray(length)
        for number in range(_MISSES):
            offset = number * 37 % _MISSES * (_FILE_BYTES // _MISSES)
            begin = time.perf_counter()
            os.preadv(descriptor, [buffer], offset)
            yield time.perf_counter() - begin
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        _serve(sys.argv[2])
    else:
        runs = int(sys.argv[1]) if len(sys.argv) > 1 else 9
        sys.stdout.write(json.dumps(bench_fuse(runs=runs).to_dict()) + "\n")
