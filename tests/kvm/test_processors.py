"""Two level-1 VMs with different processors, and a store between them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvm.disks import Job
from kvm.guests import make_images
from kvm.machine import Level1

if TYPE_CHECKING:
    from pathlib import Path

CHOSEN = "TORPOR_TEST_PROCESSORS"
DEADLINE_S = 600.0


@pytest.mark.kvm
@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(not os.environ.get(CHOSEN), reason=f"takes two VMs; {CHOSEN}=1 runs it")
def test_snapshots_between_processors(tmp_path: Path) -> None:
    """A named model's snapshot wakes on another processor; the host's own is refused by CPUID."""
    images = make_images()
    first, _ = run(tmp_path / "first", "max", "sleep", {}, images)
    files = [path for path in first.rglob("*") if path.is_file()]
    given = {f"from/{path.relative_to(first)}": path for path in files}
    _, said = run(tmp_path / "second", "EPYC", "wake", given, images)
    print(said)  # noqa: T201
    assert "cannot run on this host" in said
    assert "CPUID 7.0.ebx on this host lacks bit" in said


def run(
    work: Path, processor: str, step: str, files: dict[str, Path], images: Path
) -> tuple[Path, str]:
    """What one step of `inside/processors.py` left in its directory, and said."""
    work.mkdir()
    output: list[bytes] = []
    place = "/rig/from" if files else "/rig/out"
    job = Job(["python", "tests/kvm/inside/processors.py", step, place], {}, files, images)
    with Level1(job, work, on_output=output.append, processor=processor) as level1:
        ended = level1.wait(DEADLINE_S)
    said = b"".join(output).decode(errors="replace")
    assert (ended, level1.code) == (True, 0), said + level1.console[-3000:]
    level1.fetch_files(work / "out")
    return work / "out", said
