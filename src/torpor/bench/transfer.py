"""One push or pull in a process of its own, whose time and memory are then its alone.

`python -m torpor.bench.transfer` reads a Job from standard input and prints an Outcome, both JSON.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, assert_never

import msgspec

from torpor.bench.link import inside
from torpor.config import Settings
from torpor.host.process import run
from torpor.image.library import ImageLibrary
from torpor.snapshot import whole
from torpor.snapshot.local import LocalSnapshots
from torpor.snapshot.repository.keys import parse_keyring
from torpor.snapshot.repository.pulling import Here, pull
from torpor.snapshot.repository.pushing import push
from torpor.snapshot.repository.repository import Repository
from torpor.store.metrics import Counters
from torpor.store.stack import open_store
from torpor.units import Digest

if TYPE_CHECKING:
    from torpor.snapshot.transfer import TransferReport
    from torpor.store.interface import Store

_DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL")

Way = Literal["repository", "whole", "zeros"]
"""As torpor does; as whole files without their holes; as whole files, memory's zeros too."""
WAYS: Final[tuple[Way, ...]] = ("repository", "whole", "zeros")


class Target(msgspec.Struct, frozen=True):
    """A store and the keyring for it."""

    url: str
    endpoint: str
    user: str
    password: str
    key: str

    def settings(self) -> Settings:
        """Settings for it."""
        return Settings(
            store=self.url,
            s3_endpoint=self.endpoint,
            s3_access_key_id=self.user,
            s3_secret_access_key=self.password,
            key=self.key,
        )


class Push(msgspec.Struct, frozen=True, tag=True):
    """Push a snapshot of the directory `snapshots`; `images` are files by digest."""

    snapshots: str
    digest: str
    images: dict[str, str]
    base: str | None
    ref: str


class Pull(msgspec.Struct, frozen=True, tag=True):
    """Pull a ref to a home that has nothing."""

    home: str
    ref: str


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Sum the objects' lengths up."""


class Clear(msgspec.Struct, frozen=True, tag=True):
    """Delete every object."""


class Job(msgspec.Struct, frozen=True):
    """What to do with which store."""

    target: Target
    task: Push | Pull | Measure | Clear
    way: Way = "repository"


class Outcome(msgspec.Struct, frozen=True):
    """What it took: seconds, CPU seconds, and the most memory that was resident, in bytes.

    `bytes_up` and `bytes_down` are content that travelled, `requests` by the store's operation;
    `raw_bytes` is window content that was read, hashed and compared, or written and verified;
    `stored_bytes` is the answer to a Measure.
    """

    duration_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    raw_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    requests: dict[str, int] = {}
    stored_bytes: int = 0


def perform(job: Job, *, namespace: Path) -> Outcome:
    """Do a job in a fresh process inside `namespace`. Raises ProgramFailed with its words."""
    answer = inside(
        namespace,
        lambda: run(
            [*_DIES_WITH_US, sys.executable, "-m", "torpor.bench.transfer"],
            input_bytes=msgspec.json.encode(job),
            env={"no_proxy": "*", "NO_PROXY": "*"},
        ),
    )
    return msgspec.json.decode(answer, type=Outcome)


class _Quiet:
    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        pass


def _do(job: Job) -> Outcome:
    settings, counters = job.target.settings(), Counters()
    store = open_store(settings, counters=counters)
    report, stored_bytes = None, 0
    cpu_s = time.process_time()
    match job.task:
        case Push() as task:
            report = _push(store, settings, task, job.way)
        case Pull() as task:
            report = _pull(store, settings, task, job.way)
        case Measure():
            stored_bytes = sum(info.size_bytes for info in store.list(""))
        case Clear():
            store.delete_many([info.key for info in store.list("")])
        case other:
            assert_never(other)
    counts = counters.snapshot()
    return Outcome(
        duration_s=report.duration_s if report else 0.0,
        cpu_s=time.process_time() - cpu_s,
        peak_bytes=_peak_bytes(),
        raw_bytes=report.raw_bytes if report else 0,
        bytes_up=counts.bytes_up,
        bytes_down=counts.bytes_down,
        requests=dict(counts.requests),
        stored_bytes=stored_bytes,
    )


def _push(store: Store, settings: Settings, task: Push, way: Way) -> TransferReport:
    snapshots = LocalSnapshots(Path(task.snapshots))
    snapshot = snapshots.get(task.digest)
    images = {Digest(digest): Path(path) for digest, path in task.images.items()}
    if way != "repository":
        return whole.push(
            store,
            snapshot,
            ref=task.ref,
            images=images,
            progress=_Quiet(),
            zeros=way == "zeros",
        )
    return push(
        _repository(store, settings),
        snapshot,
        ref=task.ref,
        images=images,
        base=snapshots.get(task.base) if task.base else None,
        progress=_Quiet(),
    )


def _pull(store: Store, settings: Settings, task: Pull, way: Way) -> TransferReport:
    home = Path(task.home)
    snapshots, images = LocalSnapshots(home / "snapshots"), ImageLibrary(home / "images")
    if way != "repository":
        return whole.pull(
            store,
            task.ref,
            snapshots=snapshots,
            adopt_image=images.adopt,
            has_image=images.has,
            progress=_Quiet(),
            zeros=way == "zeros",
        )[2]
    here = Here(snapshots, images.has, images.adopt)
    return pull(_repository(store, settings), task.ref, here=here, progress=_Quiet())[2]


def _repository(store: Store, settings: Settings) -> Repository:
    return Repository(store, parse_keyring(settings.key, source="the job"))


def _peak_bytes() -> int:
    """VmHWM of proc(5): ru_maxrss would begin with what the parent had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("every process has a VmHWM")


if __name__ == "__main__":
    sys.stdout.buffer.write(
        msgspec.json.encode(_do(msgspec.json.decode(sys.stdin.buffer.read(), type=Job)))
    )
