"""`bench paging` in a tiny size: what it prints, and that nothing is left, killed or not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fixtures.minio import BINARY
from fixtures.pagers import until
from torpor.bench.paging import bench_paging
from torpor.bench.workspace import workspace
from torpor.config import Settings
from torpor.host.process import find_processes_in
from torpor.node.node import Node
from torpor.pager.client import PagerClient
from torpor.units import MiB

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.host,
    pytest.mark.minio,
    pytest.mark.skipif(not BINARY.exists(), reason="there is no MinIO; `make setup-test`"),
]


async def test_what_it_measures(tmp_path: Path) -> None:
    """Each promised series has its samples, all above zero, as one JSON object."""
    home = tmp_path / "home"
    async with Node.open(Settings(home=home)) as node:
        report = await bench_paging(node, runs=1, minio=BINARY, memory_bytes=64 * MiB)
    printed = json.loads(json.dumps(report.to_dict()))
    assert printed["scenario"] == "paging"
    counts = {name: len(series["samples"]) for name, series in printed["series"].items()}
    assert counts == {
        "push": 1,
        "sequential read": 1,
        "miss of one window": 64,
        "miss of one mebibyte": 64,
        "miss of one mebibyte, in turn": 64,
        "windows missed": 1,
        "push of a working set": 1,
        "miss of one window in the store": 64,
    }
    assert all(min(series["samples"]) > 0 for series in printed["series"].values())
    (missed,) = printed["series"]["windows missed"]["samples"]
    assert missed >= 64 * (1 + 64 + 64)  # none was in the page cache
    assert printed["promises"].keys() < counts.keys()
    assert printed["promises"]["sequential read"]["bound"] == "at least 4e+08"
    assert not list((home / "bench").iterdir())
    assert find_processes_in(home) == []


KILLED = """
import sys
from pathlib import Path
from torpor.bench.workspace import workspace
from torpor.config import Settings
from torpor.pager.client import PagerClient
with workspace(Path(sys.argv[1])) as place:
    (place.directory / "node").mkdir()
    PagerClient(Settings(home=place.directory / "node")).ensure()
    print("started", flush=True)
    sys.stdin.read()
"""


def test_pagers_of_a_killed_benchmark_are_ended(tmp_path: Path) -> None:
    """The next benchmark ends the pager of one that was killed, and removes its directory."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "started\n"
        (left,) = (tmp_path / "bench").iterdir()
        assert PagerClient(Settings(home=left / "node")).is_running()
        one.send_signal(signal.SIGKILL)
    with workspace(tmp_path) as place:
        until(lambda: find_processes_in(left) == [])
        assert list((tmp_path / "bench").iterdir()) == [place.directory]
