"""Every decoder of the repository's format against libFuzzer, bounded, from a kept corpus."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = Path(__file__).with_name("decoders.py")
CORPUS: Final = Path(__file__).parents[1] / "data" / "corpus"
FACTOR: Final = int(os.environ.get("TORPOR_TEST_FUZZ", "1"))
"""For a longer search: so many times as many executions, which see other inputs."""

RUNS: Final = {
    "record": 20_000,
    "chunk": 60_000,
    "filemap": 40_000,
    "index": 60_000,
    "wake": 10_000,
    "segment": 15_000,
    "ref": 7_000,
    "snapshot": 7_000,
    "keyring": 25_000,
    "manifest": 30_000,
}
"""Executions of each decoder after all of its corpus: some two seconds each on two slow cores."""


def fuzz(
    decoder: str, runs: int, directory: Path, *, corpus: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a fuzz target with a fixed seed; new inputs and crashes go to `directory`.

    The shell forks: libFuzzer reads its peak memory from getrusage, which a child that was made by
    vfork inherits from the test run.
    """
    (directory / "new").mkdir()
    command = [
        sys.executable,
        str(PROGRAM),
        decoder,
        f"-runs={runs}",
        "-seed=1",
        "-max_len=4096",
        "-timeout=120",
        "-rss_limit_mb=1024",
        "-verbosity=0",
        f"-artifact_prefix={directory}/",
        str(directory / "new"),
        *map(str, corpus),
    ]
    return subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", *command],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("decoder", RUNS)
def test_only_errors_of_ours_come_out(decoder: str, tmp_path: Path) -> None:
    """Whatever the bytes, a decoder accepts or refuses them by name, in bounded memory."""
    done = fuzz(decoder, RUNS[decoder] * FACTOR, tmp_path, corpus=[CORPUS / decoder])
    crashes = {path.name: path.read_bytes().hex() for path in tmp_path.glob("*-*")}
    assert done.returncode == 0, f"{crashes}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert crashes == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "words"), [("broken", "ValueError: a bug"), ("hungry", "MemoryError")]
)
def test_a_bug_would_be_found(decoder: str, words: str, tmp_path: Path) -> None:
    """A decoder that raises another error, or takes memory by a length, ends the run."""
    done = fuzz(decoder, 100_000, tmp_path)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr


def test_all_decoders_have_a_corpus() -> None:
    """Each decoder begins with sound inputs and with some that once did harm elsewhere."""
    assert {path.name for path in CORPUS.iterdir()} == set(RUNS)
    assert all(any((CORPUS / name).glob("seed-*")) for name in RUNS)
