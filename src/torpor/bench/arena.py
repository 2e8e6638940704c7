"""A store and a link for one benchmark: pushes and pulls in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from torpor.bench.link import Link, shaped_link
from torpor.bench.minio import Minio, minio_server
from torpor.bench.report import host_parameters
from torpor.bench.synthetic import GUEST_LIKE, SyntheticNode
from torpor.bench.transfer import Clear, Job, Measure, Outcome, Pull, Push, Target, perform
from torpor.bench.workspace import Workspace, workspace
from torpor.config import Settings
from torpor.snapshot.repository.keys import new_key_line
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.units import GiB, MiB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.bench.synthetic import Content, Subject
    from torpor.bench.transfer import Way

_LINK_SAMPLE_BYTES: Final = 64 * MiB


@dataclass(frozen=True)
class Sizes:
    """How large the made-up snapshots are.

    `rate`: the one whose push and pull are timed. `peak`: guest memory of those whose memory use
    is looked at. The others are a base and functions on it, made only where no VM is started.
    """

    rate_bytes: int = 512 * MiB
    peak_bytes: int = 4 * GiB
    image_bytes: int = 40 * MiB
    guest_bytes: int = 256 * MiB
    base_bytes: int = 74 * MiB
    written_bytes: int = 12 * MiB

    def needed_bytes(self) -> int:
        """Disk space that a benchmark takes at most: here, in the store, on the other node."""
        return 3 * self.peak_bytes + 3 * self.rate_bytes + 30 * self.base_bytes

    def to_dict(self) -> dict[str, int]:
        """As a report's parameter."""
        return {"rate_bytes": self.rate_bytes, "peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class Arena:
    """Where a benchmark pushes and pulls. Blocking; one thread.

    A prefix of the bucket is a store of its own. `shaped` says whether the link is in between.
    """

    workspace: Workspace
    link: Link
    minio: Minio
    key: str = field(default_factory=new_key_line)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def push(
        self, subject: Subject, prefix: str, *, way: Way = "repository", shaped: bool = False
    ) -> Outcome:
        """Push a snapshot; its ref is its function's name."""
        snapshot = subject.snapshot
        task = Push(
            snapshots=str(snapshot.directory.parent),
            digest=snapshot.digest,
            images={digest: str(path) for digest, path in subject.images.items()},
            base=subject.base.digest if subject.base else None,
            ref=ref_of(subject),
        )
        return self._perform(task, prefix, way, shaped)

    def pull(
        self, subject: Subject, prefix: str, *, way: Way = "repository", shaped: bool = False
    ) -> Outcome:
        """Pull a snapshot that was pushed to a node that has nothing, which is removed again."""
        home = self.workspace.directory / f"node-{next(self._numbers)}"
        try:
            return self._perform(Pull(str(home), ref_of(subject)), prefix, way, shaped)
        finally:
            shutil.rmtree(home, ignore_errors=True)

    def stored_bytes(self, prefix: str) -> int:
        """Sum of the lengths of a prefix's objects."""
        return self._perform(Measure(), prefix, "repository", False).stored_bytes

    def clear(self, prefix: str) -> None:
        """Delete a prefix's objects."""
        self._perform(Clear(), prefix, "repository", False)

    def parameters(self, sizes: Sizes, runs: int) -> dict[str, Any]:
        """What every report of this arena carries; blocking, sends some data over the link."""
        return {
            **host_parameters(),
            "minio": self.minio.version,
            "link": self.link.to_dict(),
            "link_measured_bytes_per_s": round(self.link.measure(_LINK_SAMPLE_BYTES)),
            "window_bytes": WINDOW_BYTES,
            "zstd_level": Settings().zstd_level,
            "content": GUEST_LIKE,
            "cpus": os.cpu_count(),
            "load_at_begin": [round(load, 1) for load in os.getloadavg()],
            **sizes.to_dict(),
            "runs": runs,
        }

    @contextlib.contextmanager
    def synthetic(
        self, *, memory_bytes: int, data_bytes: int, content: Content
    ) -> Iterator[Subject]:
        """A snapshot with so much content, without anything else, gone after the body."""
        directory = self.workspace.directory / f"synthetic-{next(self._numbers)}"
        try:
            node = SyntheticNode(directory)
            image = node.make_image(1, size_bytes=WINDOW_BYTES)
            yield node.make_base(
                image, memory_bytes=memory_bytes, data_bytes=data_bytes, content=content
            )
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _perform(
        self, task: Push | Pull | Measure | Clear, prefix: str, way: Way, shaped: bool
    ) -> Outcome:
        minio = self.minio
        target = Target(minio.url(prefix), minio.endpoint, minio.user, minio.password, self.key)
        side = self.link.node_side if shaped else self.link.store_side
        return perform(Job(target, task, way), namespace=side)


@contextlib.contextmanager
def arena(home: Path, *, minio: Path, needed_bytes: int) -> Iterator[Arena]:
    """An arena that is gone after the body: processes, namespaces, files.

    Raises NoSpace, HostUnfit.
    """
    with (
        workspace(home) as work,
        shaped_link(work.namespace_prefix) as link,
    ):
        work.require(needed_bytes)
        with minio_server(
            minio,
            work.directory / "minio",
            namespace=link.store_side,
            address=link.store_address,
        ) as server:
            yield Arena(work, link, server)


def ref_of(subject: Subject) -> str:
    """The ref under which a subject is pushed."""
    function = subject.snapshot.manifest.function
    return function.name if function else "base"
