"""The set-up of a clone: quick when repeated, safe to kill, clear about what failed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("network_of_the_host")]

ROOT = Path(__file__).parents[2]
CACHE = os.environ.get("TORPOR_CACHE", "/var/cache/torpor")
BOOT_DIR = os.environ.get("TORPOR_BOOT_DIR", "/var/cache/torpor/boot")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A second clone, not yet set up."""
    target = tmp_path / "clone"
    for name in ("scripts", "src"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture
def environ() -> dict[str, str]:
    """The environment of the tests with their cache, so that nothing is downloaded again."""
    return {**os.environ, "TORPOR_CACHE": CACHE, "TORPOR_BOOT_DIR": BOOT_DIR}


def set_up(clone: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run scripts/setup to its end."""
    return subprocess.run(
        [clone / "scripts" / "setup"],
        env=environ,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def setting_up(clone: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """scripts/setup under way, in a process group of its own that is killed at the end."""
    child = subprocess.Popen(
        [clone / "scripts" / "setup"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        yield child
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def test_second_clone_is_set_up_from_the_cache(clone: Path, environ: dict[str, str]) -> None:
    """A clone on a machine with another one needs no network, and a repetition changes nothing."""
    assert set_up(clone, environ).returncode == 0
    shutil.rmtree(clone / ".venv")
    offline = {**environ, "UV_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    first = set_up(clone, offline)
    assert first.returncode == 0, first.stderr
    assert (clone / ".venv" / "bin" / "torpor").exists()
    made = (clone / ".venv" / "torpor-lock").stat().st_mtime_ns
    again = set_up(clone, offline)
    assert again.returncode == 0, again.stderr
    assert (clone / ".venv" / "torpor-lock").stat().st_mtime_ns == made
    moved = clone.rename(clone.with_name("moved"))
    assert set_up(moved, offline).returncode == 0
    helped = subprocess.run(
        [moved / ".venv" / "bin" / "torpor", "--help"], capture_output=True, check=False
    )
    assert helped.returncode == 0, helped.stderr


def test_killed_set_up_is_repeated(clone: Path, environ: dict[str, str]) -> None:
    """Killed while it makes the virtual environment: the next one makes it whole."""
    with setting_up(clone, environ) as child:
        while not (clone / ".venv").exists() and child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.002)
    assert not (clone / ".venv" / "torpor-lock").exists()
    assert set_up(clone, environ).returncode == 0
    assert (clone / ".venv" / "torpor-lock").exists()


def test_failing_step_is_told(clone: Path, environ: dict[str, str]) -> None:
    """A package that is not the one in the lock is refused; step, reason and log are named."""
    lock = clone / "requirements.lock"
    text = lock.read_text()
    place = text.index("--hash=sha256:", text.index("\nblake3==")) + len("--hash=sha256:")
    lines = text[place:].split("    # via", 1)
    lock.write_text(text[:place] + "0" * 64 + "\n    # via" + lines[1])
    failed = set_up(clone, environ)
    assert failed.returncode == 1
    assert failed.stdout.splitlines()[-1] == "setup: virtual environment"
    assert "blake3" in failed.stderr
    assert f"setup: failed: scripts/make-venv; the log of all steps is {CACHE}/setup.log" in (
        failed.stderr
    )
    assert not (clone / ".venv" / "torpor-lock").exists()
    lock.write_text(text)
    assert set_up(clone, environ).returncode == 0


def test_altered_download_in_the_cache_is_replaced(
    clone: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    """The uv in the cache is used only while it is the file that was installed."""
    own = {**environ, "TORPOR_CACHE": str(tmp_path / "cache")}
    assert set_up(clone, environ).returncode == 0
    shutil.rmtree(clone / ".venv")
    kept = [path.parent for path in Path(CACHE, "tools").glob("uv-*/uv")]
    assert kept
    for directory in kept:
        fake = tmp_path / "cache" / "tools" / directory.name
        fake.mkdir(parents=True)
        (fake / "uv").write_text("#!/bin/sh\necho altered; exit 1\n")
        (fake / "uv").chmod(0o755)
        (fake / "uv.sha256").write_text((directory / "uv.sha256").read_text())
    offline = {**own, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    refused = subprocess.run(
        [clone / "scripts" / "make-venv"], env=offline, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "altered" not in refused.stdout
    assert "No matching distribution found for uv==" in refused.stderr
