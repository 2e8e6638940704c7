"""Snapshots of made-up content, made without a VM, that benchmarks push and pull."""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from torpor.host.cancel import checkpoint
from torpor.host.sparse import PAGE_BYTES, blake3_file, copy_sparse
from torpor.snapshot.local import LocalSnapshot, LocalSnapshots
from torpor.snapshot.manifest import Function, Machine, Platform
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.units import Digest, KiB, MiB

Content = Callable[[int, int], bytes]
"""Bytes for (seed, length), the same for the same seed."""

GUEST_LIKE: Final = "pages of this Python's files, each made unique"

_PLATFORM: Final = Platform(
    "x86_64", "synthetic", "1", "none", "none", "none", "", (), PAGE_BYTES, Digest("0" * 64)
)
_PIECE_BYTES: Final = 8 * MiB
_POOL_BYTES: Final = 64 * MiB
_VMSTATE_BYTES: Final = 21 * KiB
_DISK_WINDOWS: Final = 48
_RUN_PAGES: Final = 3


@dataclass(frozen=True)
class Subject:
    """A snapshot that is pushed, with the files of its images and the base it descends from."""

    snapshot: LocalSnapshot
    images: dict[Digest, Path]
    base: LocalSnapshot | None = None


class SyntheticNode:
    """A node's snapshots and images below a directory. Blocking."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._snapshots = LocalSnapshots(directory / "snapshots")
        self._images: dict[Digest, Path] = {}

    def make_image(self, seed: int, *, size_bytes: int) -> Digest:
        """An image of content that does not compress, as a squashfs does not."""
        path = self._directory / f"image-{seed}"
        with path.open("wb") as stream:
            _fill(stream, 0, size_bytes, random_bytes, seed)
        digest = blake3_file(path)
        self._images[digest] = path
        return digest

    def make_base(
        self, image: Digest, *, memory_bytes: int, data_bytes: int, content: Content
    ) -> Subject:
        """A snapshot without parent whose first `data_bytes` of memory are `content`."""
        with self._snapshots.stage() as staging:
            for path, size in ((staging.memory, memory_bytes), (staging.disk, memory_bytes)):
                with path.open("wb") as stream:
                    stream.truncate(size)
                    if path == staging.memory:
                        _fill(stream, 0, data_bytes, content, 1)
            staging.vmstate.write_bytes(random_bytes(1, _VMSTATE_BYTES))
            digest = staging.publish(
                kind="base",
                created_ns=1,
                parent=None,
                platform=_PLATFORM,
                machine=Machine(memory_bytes, 1, memory_bytes, 0),
                image=image,
                function=None,
            )
        return Subject(self._snapshots.get(digest), {image: self._images[image]})

    def make_function(
        self, base: Subject, seed: int, *, written_bytes: int, content: Content
    ) -> Subject:
        """A function over a base: so much of memory written in short runs, some disk, an app.

        Functions of different seeds write to different places and share no content.
        """
        manifest = base.snapshot.manifest
        app = self.make_image(1000 + seed, size_bytes=64 * KiB)
        with self._snapshots.stage() as staging:
            copy_sparse(base.snapshot.memory, staging.memory)
            copy_sparse(base.snapshot.disk, staging.disk)
            runs = _written_runs(seed, manifest.memory.size_bytes, written_bytes)
            with staging.memory.open("r+b") as stream:
                for number, (offset, length) in enumerate(runs):
                    stream.seek(offset)
                    stream.write(content(seed * 1_000_003 + number, length))
            staging.record_written(runs)
            with staging.disk.open("r+b") as stream:
                _fill(stream, 0, _DISK_WINDOWS * WINDOW_BYTES, content, -seed)
            staging.vmstate.write_bytes(random_bytes(seed, _VMSTATE_BYTES))
            digest = staging.publish(
                kind="function",
                created_ns=1 + seed,
                parent=base.snapshot.digest,
                platform=_PLATFORM,
                machine=manifest.machine,
                image=manifest.image,
                function=Function(f"function-{seed}", 1, 8080, app),
            )
        images = {**base.images, app: self._images[app]}
        return Subject(self._snapshots.get(digest), images, base.snapshot)


def random_bytes(seed: int, length: int) -> bytes:
    """Content that does not compress."""
    return random.Random(seed).randbytes(length)


def zero_bytes(seed: int, length: int) -> bytes:
    """Content of zeros, for which files have holes."""
    return b""


def guest_like(directory: Path | None = None) -> Content:
    """Content that compresses as a guest's memory does, from files such as it has in its cache.

    No two pages of it are the same.
    """
    pool = _pool(directory or Path(sysconfig.get_paths()["stdlib"]))
    pages = len(pool) // PAGE_BYTES

    def content(seed: int, length: int) -> bytes:
        rng = random.Random(seed)
        made = bytearray()
        for _ in range(0, length, PAGE_BYTES):
            begin = rng.randrange(pages) * PAGE_BYTES
            made += rng.randbytes(16)
            made += pool[begin + 16 : begin + PAGE_BYTES]
        return bytes(made[:length])

    return content


def _pool(directory: Path) -> memoryview:
    pool = bytearray(Path(sys.executable).resolve().read_bytes())
    for path in sorted(directory.rglob("*.*")):
        if path.suffix in (".py", ".pyc", ".so") and path.is_file():
            pool += path.read_bytes()
        if len(pool) >= _POOL_BYTES:
            break
    return memoryview(bytes(pool))


def _fill(stream: BinaryIO, offset: int, length: int, content: Content, seed: int) -> None:
    for begin in range(0, length, _PIECE_BYTES):
        checkpoint()
        stream.seek(offset + begin)
        piece = content(seed * 65_537 + begin, min(_PIECE_BYTES, length - begin))
        stream.write(piece)


def _written_runs(seed: int, memory_bytes: int, written_bytes: int) -> list[tuple[int, int]]:
    """Runs of a few pages, page-aligned, ascending and apart from each other."""
    run_bytes = _RUN_PAGES * PAGE_BYTES
    places = random.Random(seed).sample(
        range(memory_bytes // (2 * run_bytes)), written_bytes // run_bytes
    )
    return [(place * 2 * run_bytes, run_bytes) for place in sorted(places)]
