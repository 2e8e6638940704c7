"""The disks of a run of level 1: what is on its writable one, and what comes back."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torpor.config import Settings
from torpor.image.packages import apt_sources

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).parents[2]

CAPACITY_BYTES = 16 << 30
_TREE = ("src", "tests", "examples", "scripts", "docs", "pyproject.toml", "requirements.lock")
_COMPILED = ("src", "tests/fixtures", "tests/kvm", "tests/vm", "tests/contract/vmm")
_MEMORY = ('memory = "256MiB"', 'memory = "128MiB"')
"""The examples get less of it in level 1, where every page costs: init_on_free writes them all."""
_SKIPPED = shutil.ignore_patterns("__pycache__", ".*_cache")
_INIT = ROOT / "tests" / "kvm" / "level1" / "init"


@dataclass(frozen=True)
class Job:
    """What level 1 does: a command in the tree, with an environment and further files.

    `files` maps paths below /rig to files of this host; what the command leaves in /rig/out
    comes back.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    images: Path | None = None
    """A home's images, which become those of the home for tests in level 1."""


PROGRAMS = {"TORPOR_FIRECRACKER": "extra/firecracker", "TORPOR_JAILER": "extra/jailer"}
"""Variables that name a program of this host for level 1, and where that has it below /rig."""


def named_programs() -> tuple[dict[str, str], dict[str, Path]]:
    """The environment and the files of a job that is to have what `PROGRAMS` name, if they do."""
    named = {name: path for name in PROGRAMS if (path := os.environ.get(name))}
    environment = {name: f"/rig/{PROGRAMS[name]}" for name in named}
    files = {PROGRAMS[name]: Path(shutil.which(path) or path) for name, path in named.items()}
    return environment, files


@functools.lru_cache(maxsize=1)
def find_built() -> tuple[Path, Path]:
    """The directories of the disks Debian and Python, built if they are not there."""
    lines = subprocess.run(
        [ROOT / "scripts" / "install-rig"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    return Path(lines[0]), Path(lines[1])


def make_run_disk(job: Job, work: Path) -> Path:
    """The writable disk, mounted at /rig: tree, guests' kernel and images, the job."""
    stage = work / "stage"
    _lay_out(job, stage)
    disk = work / "run"
    with disk.open("xb") as stream:
        stream.truncate(CAPACITY_BYTES)
    subprocess.run(
        [
            *("/sbin/mke2fs", "-q", "-t", "ext4", "-b", "4096", "-m", "0"),
            *("-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0"),
            *("-d", str(stage), str(disk)),
        ],
        check=True,
    )
    shutil.rmtree(stage)
    return disk


def unpack_results(disk: Path, target: Path) -> None:
    """The files that the job left in /rig/out."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "--extract", "--file", disk, "--directory", target], check=True)


def _lay_out(job: Job, stage: Path) -> None:
    stage.mkdir()
    for name in _TREE:
        source = ROOT / name
        copy: Callable[..., object] = shutil.copytree if source.is_dir() else shutil.copy2
        options = {"ignore": _SKIPPED, "symlinks": True} if source.is_dir() else {}
        (stage / "tree").mkdir(exist_ok=True)
        copy(source, stage / "tree" / name, **options)
    where = ("-s", str(stage), "-p", "/rig", *(str(stage / "tree" / part) for part in _COMPILED))
    subprocess.run([sys.executable, "-m", "compileall", "-q", *where], check=True)
    for function in (stage / "tree" / "examples").glob("*/function.toml"):
        function.write_text(function.read_text().replace(*_MEMORY))
    shutil.copy2(_INIT, stage / "init")
    (stage / "init").chmod(0o755)
    boot = Settings().boot_dir
    shutil.copytree(boot, stage / "cache" / "boot", copy_function=_link)
    if job.images is not None:
        shutil.copytree(job.images, stage / "cache" / "test-home" / "images", copy_function=_link)
    for source in apt_sources():
        target = stage / "apt" / source.relative_to("/etc/apt")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    for name, source in job.files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, stage / name)
    (stage / "job").mkdir(exist_ok=True)
    (stage / "job" / "command").write_bytes(b"".join(w.encode() + b"\0" for w in job.command))
    environment = {
        "TORPOR_MINIO": "/python/minio",
        "PYTHONPATH": "/rig/tree/tests",
        "PYTHONDONTWRITEBYTECODE": "",
        **job.environment,
    }
    (stage / "job" / "environment").write_text(
        "".join(f"{name}={shlex.quote(value)}\n" for name, value in environment.items())
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
