"""`bench push` and `bench pull` in a tiny size: what they print, and that they leave nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.minio import BINARY
from torpor.bench.arena import Sizes, arena
from torpor.bench.link import inside, shaped_link
from torpor.bench.pull import bench_pull
from torpor.bench.push import bench_push
from torpor.bench.workspace import workspace
from torpor.config import Settings
from torpor.errors import HostUnfit, NoSpace, ProgramFailed
from torpor.host.process import find_processes_in
from torpor.net.addresses import BENCH_NAMESPACE_PREFIX, NETNS_DIR
from torpor.node.node import Node
from torpor.units import KiB, MiB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.bench.report import Report

pytestmark = [
    pytest.mark.host,
    pytest.mark.minio,
    pytest.mark.skipif(not BINARY.exists(), reason="there is no MinIO; `make setup-test`"),
]

TORPOR = Path(sys.executable).with_name("torpor")
TINY = Sizes(
    rate_bytes=2 * MiB,
    peak_bytes=2 * MiB,
    image_bytes=256 * KiB,
    guest_bytes=8 * MiB,
    base_bytes=5 * MiB,
    written_bytes=192 * KiB,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home of a node."""
    return tmp_path / "home"


async def measure(home: Path, scenario: str) -> Report:
    """One round of a scenario without VMs."""
    bench = {"push": bench_push, "pull": bench_pull}[scenario]
    async with Node.open(Settings(home=home)) as node:
        return await bench(node, function=Path("no"), runs=1, minio=BINARY, vms=False, sizes=TINY)


async def test_push_says_what_it_sent_and_what_it_took(home: Path) -> None:
    """Every promised series and ratio is there; what is unchanged or shared is not sent again."""
    report = (await measure(home, "push")).to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["scenario"] == "push"
    assert report["parameters"]["link"]["rate_bits_per_s"] == 1_000_000_000
    assert "generation_bytes" in report["parameters"]["left_out"]
    assert set(report["ratios"]) == {
        *("unchanged/first", "second/first", "ten/alone"),
        *("whole_file/repository", "whole_file second/repository second"),
    }
    series = {name: value["samples"] for name, value in report["series"].items()}
    assert {"rate", "peak random", "peak zeros", "whole_file", "repository"} <= set(series)
    assert all(len(samples) == 1 for samples in series.values())
    assert series["unchanged"][0] < 0.01 * series["first"][0]
    assert series["unchanged requests"][0] < series["first requests"][0] < 40
    assert TINY.written_bytes / 3 < series["second"][0] < 0.5 * series["first"][0]
    assert series["ten"][0] < 0.5 * series["alone"][0]
    assert not list((home / "bench").iterdir())


async def test_pull_says_what_came_and_what_it_took(home: Path) -> None:
    """Every promised series and ratio is there; compressed windows are less than whole files."""
    report = (await measure(home, "pull")).to_dict()
    assert set(report["ratios"]) == {"whole_file/repository"}
    series = {name: value["samples"] for name, value in report["series"].items()}
    assert {"rate", "rate per CPU second", "peak random", "peak zeros"} <= set(series)
    assert series["repository bytes"][0] < 0.8 * series["whole_file bytes"][0]
    assert not list((home / "bench").iterdir())


def test_the_link_is_as_slow_as_it_says(home: Path) -> None:
    """What goes over a link of 100 Mbit/s goes no faster, bursts aside, and gets there."""
    with workspace(home) as work, shaped_link(work.namespace_prefix, rate_bits_per_s=10**8) as link:
        assert 0 < link.measure(8 * MiB) < 1.1 * 10**8 / 8
        assert inside(link.store_side, lambda: os.listdir("/sys/class/net"))


def test_a_minio_that_does_not_start_leaves_nothing(home: Path) -> None:
    """Its last words are the reason; namespaces and directory are gone."""
    with (
        pytest.raises((HostUnfit, ProgramFailed)),
        arena(home, minio=Path("/bin/false"), needed_bytes=0),
    ):
        raise AssertionError("it started")
    assert not list((home / "bench").iterdir())


def test_a_disk_without_room_is_told_before_anything_is_made(home: Path) -> None:
    """What a benchmark needs is asked for first."""
    with (
        pytest.raises(NoSpace, match="needs"),
        arena(home, minio=BINARY, needed_bytes=1 << 60),
    ):
        raise AssertionError("it started")


@contextlib.contextmanager
def benchmark_under_way(home: Path) -> Iterator[subprocess.Popen[str]]:
    """`torpor bench push` that has started its MinIO."""
    command = [TORPOR, "--home", home, "bench", "push", "--no-vm", "--memory", "64MiB"]
    with subprocess.Popen(
        [*command, "--minio", BINARY],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("pushing"):
                    break
            yield process
        finally:
            process.kill()


def namespaces_of(pid: int) -> list[str]:
    """The namespaces that a benchmark's process has made."""
    return sorted(path.name for path in NETNS_DIR.glob(f"{BENCH_NAMESPACE_PREFIX}{pid}-*"))


def test_an_interrupted_benchmark_leaves_nothing(home: Path) -> None:
    """SIGINT ends it with 130, its MinIO, link and files gone."""
    with benchmark_under_way(home) as process:
        assert len(namespaces_of(process.pid)) == 2
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    assert not namespaces_of(process.pid)
    assert not list((home / "bench").iterdir())
    assert not find_processes_in(home)


def test_what_a_killed_benchmark_left_goes_with_the_next(home: Path) -> None:
    """SIGKILL: the kernel ends its MinIO, the next workspace removes its link and files."""
    with benchmark_under_way(home) as process:
        process.kill()
        process.communicate()
    for left in find_processes_in(home):
        assert left.wait(timeout_s=60)
    assert len(namespaces_of(process.pid)) == 2
    with workspace(home) as work:
        assert not namespaces_of(process.pid)
        assert list((home / "bench").iterdir()) == [work.directory]
