"""`torpor bench paging`: what reading through the pager costs, from the chunk cache and the store.

Everything is on one host: a MinIO on loopback, a made-up snapshot, the real pager in between. The
protocol and the kernel alone are measured by `bench.fuse`.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.bench.arena import Arena, arena, ref_of
from torpor.bench.fuse import bench_fuse
from torpor.bench.link import inside
from torpor.bench.report import Report, at_least, at_most, host_parameters
from torpor.bench.synthetic import GUEST_LIKE, guest_like
from torpor.config import Settings
from torpor.host.cancel import checkpoint, in_thread
from torpor.pager.client import PagerClient
from torpor.pager.source import Source
from torpor.snapshot.windows import WINDOW_BYTES, Touched
from torpor.units import Digest, MiB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.bench.synthetic import Subject
    from torpor.node.node import Node
    from torpor.pager.client import Served

_MEMORY_BYTES: Final = 128 * MiB
_MISSES: Final = 64
_PREFIX: Final = "paging"
_WAIT_S: Final = 600.0
_PROMISES: Final = {
    "push": at_least(1.2e9),
    "sequential read": at_least(400e6),
    "miss of one window": at_most(0.0005),
    "miss of one mebibyte": at_most(0.003),
    "miss of one window in the store": at_most(0.004),
}


async def bench_paging(
    node: Node, *, runs: int, minio: Path, memory_bytes: int = _MEMORY_BYTES
) -> Report:
    """Each round, the page cache dropped before each: a sequential read, misses, a push.

    They are served from this node's disk, whose own page cache is warm; the last series from the
    store, by a pager whose chunk cache holds one window. `push` is of pages alone, as `bench.fuse`
    measures it; of a working set they are opened first. Needs root. Raises HostUnfit.
    """
    return await in_thread(_measure, node, runs, minio, memory_bytes)


@dataclass(frozen=True)
class _Paged:
    """A snapshot that is open in a pager of its own home."""

    client: PagerClient
    source: Source
    ref: str
    size_bytes: int

    def open(self) -> Served:
        """Open it; what it is open as already is kept."""
        return self.client.open(self.ref, self.source)

    def windows_read(self) -> int:
        """How many windows of memory readers had from the pager so far."""
        (counted,) = self.client.counters()["snapshots"].values()
        memory = counted["files"]["memory"]
        return int(memory["zero"] + memory["cache"] + memory["store"])

    def close(self, digest: Digest) -> None:
        """Close it, so that the next open pushes anew."""
        self.client.close(digest)


def _measure(node: Node, runs: int, minio: Path, memory_bytes: int) -> Report:
    home, say = node.parts.settings.home, node.parts.reporter
    parameters = {
        **host_parameters(),
        "memory_bytes": memory_bytes,
        "window_bytes": WINDOW_BYTES,
        "content": GUEST_LIKE,
        "cpus": os.cpu_count(),
        "runs": runs,
    }
    report = Report("paging", parameters, promises=dict(_PROMISES))
    report.series["push"] = bench_fuse(runs=runs).series["push"]
    with (
        arena(home, minio=minio, needed_bytes=6 * memory_bytes) as place,
        place.synthetic(
            memory_bytes=memory_bytes, data_bytes=memory_bytes, content=guest_like()
        ) as subject,
    ):
        say.say(f"pushing {memory_bytes >> 20} MiB")
        windows = tuple(range(memory_bytes // WINDOW_BYTES // 2))
        subject.snapshot.record_working_set([Touched("memory", windows)])
        place.push(subject, _PREFIX)
        with (
            _paged(place, subject, "cached", cache_bytes=2 * memory_bytes) as cached,
            _paged(place, subject, "bare", cache_bytes=WINDOW_BYTES) as bare,
        ):
            _fill(cached, memory_bytes)
            for number in range(runs):
                say.say(f"round {number + 1} of {runs}")
                _round(report, cached, bare, number)
    return report


@contextlib.contextmanager
def _paged(place: Arena, subject: Subject, name: str, *, cache_bytes: int) -> Iterator[_Paged]:
    settings = Settings(
        home=place.workspace.directory / name,
        store=place.minio.url(_PREFIX),
        s3_endpoint=place.minio.endpoint,
        s3_access_key_id=place.minio.user,
        s3_secret_access_key=place.minio.password,
        key=place.key,
        cache_bytes=cache_bytes,
    )
    settings.home.mkdir()
    client = PagerClient(settings)
    try:
        inside(place.link.store_side, client.ensure)  # where MinIO is
        source = Source.of(settings, place.key)
        size_bytes = subject.snapshot.manifest.memory.size_bytes
        yield _Paged(client, source, ref_of(subject), size_bytes)
    finally:
        client.stop()


def _fill(paged: _Paged, memory_bytes: int) -> None:
    """Have everything in the chunk cache, and the working set beside it."""
    digest = paged.open().digest
    paged.client.hydrate(digest, limit_bytes=2 * memory_bytes, limit_s=_WAIT_S)
    paged.client.wait_hydrated(digest, timeout_s=_WAIT_S)
    paged.client.go(digest)
    paged.client.wait_pushed(digest, timeout_s=_WAIT_S)


def _round(report: Report, cached: _Paged, bare: _Paged, number: int) -> None:
    served = cached.open()
    path = served.files["memory"]
    with _file(path) as descriptor:
        report.add("sequential read", _read_rate(descriptor, cached.size_bytes), "B/s")
        before = cached.windows_read()
        for name, length, advice in (
            ("window", WINDOW_BYTES, os.POSIX_FADV_NORMAL),
            ("mebibyte", MiB, os.POSIX_FADV_NORMAL),
            ("mebibyte, in turn", MiB, os.POSIX_FADV_RANDOM),
        ):
            for latency_s in _misses(descriptor, cached.size_bytes, length, number, advice):
                report.add(f"miss of one {name}", latency_s, "s")
        report.add("windows missed", cached.windows_read() - before, "windows")
    cached.close(served.digest)
    report.add("push of a working set", _push_rate(cached), "B/s")
    with _file(bare.open().files["memory"]) as descriptor:
        for latency_s in _misses(descriptor, bare.size_bytes, WINDOW_BYTES, number):
            report.add("miss of one window in the store", latency_s, "s")


@contextlib.contextmanager
def _file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _drop(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _drop(descriptor: int) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_rate(descriptor: int, size_bytes: int) -> float:
    buffer = bytearray(MiB)
    begin = time.perf_counter()
    for offset in range(0, size_bytes, MiB):
        os.preadv(descriptor, [buffer], offset)
    return size_bytes / (time.perf_counter() - begin)


def _push_rate(paged: _Paged) -> float:
    """From go to the end, of what was fetched a little ahead from the copy on this node."""
    served = paged.open()
    with _file(served.files["memory"]):
        begin = time.perf_counter()
        paged.client.go(served.digest)
        paged.client.wait_pushed(served.digest, timeout_s=_WAIT_S)
        duration_s = time.perf_counter() - begin
        (counted,) = paged.client.counters()["snapshots"].values()
    return float(counted["push"]["windows"] * WINDOW_BYTES / duration_s)


def _misses(
    descriptor: int,
    size_bytes: int,
    length: int,
    number: int,
    advice: int = os.POSIX_FADV_NORMAL,
) -> Iterator[float]:
    """Reads of one length, spread over the file, others in each round.

    Without advice, as VMMs read: the kernel asks for the parts of a mebibyte at once, and for the
    part behind it. Advised that access is random, it asks for the next part when it has one.
    """
    _drop(descriptor)
    os.posix_fadvise(descriptor, 0, 0, advice)
    buffer = bytearray(length)
    step = size_bytes // _MISSES
    for place in range(_MISSES):
        checkpoint()
        offset = place * 37 % _MISSES * step + number * length % step // length * length
        begin = time.perf_counter()
        os.preadv(descriptor, [buffer], offset)
        yield time.perf_counter() - begin
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_NORMAL)
