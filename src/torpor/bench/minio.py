"""The real MinIO for a benchmark: in a fresh directory and a namespace, dead at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.bench.link import inside
from torpor.errors import HostUnfit
from torpor.host.cancel import checkpoint
from torpor.host.process import run, spawn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.host.process import ProcessId

_PORT: Final = 9000
_BUCKET: Final = "torpor-bench"
_READY_WITHIN_S: Final = 60.0
_LOOK_S: Final = 0.05


@dataclass(frozen=True)
class Minio:
    """A MinIO that answers at `endpoint` inside its namespace."""

    endpoint: str
    user: str
    password: str
    version: str

    def url(self, prefix: str) -> str:
        """The store URL of a prefix of its bucket."""
        return f"s3://{_BUCKET}/{prefix}"


def find_minio(given: Path | None = None) -> Path:
    """The MinIO program: the one given, else the one that the set-up built. Raises HostUnfit."""
    cache = Path(os.environ.get("TORPOR_CACHE") or "/var/cache/torpor")
    path = given or cache / "tools" / "minio"
    if not os.access(path, os.X_OK):
        raise HostUnfit(
            f"there is no MinIO at {path}",
            hint="`make setup-test` builds it, --minio names another",
        )
    return path


@contextlib.contextmanager
def minio_server(
    program: Path, directory: Path, *, namespace: Path, address: str
) -> Iterator[Minio]:
    """A MinIO with a fresh directory, listening on `address` inside `namespace`.

    Killed after the body, and by the kernel when the calling thread ends before that. Raises
    HostUnfit with its last words when it does not start.
    """
    (directory / _BUCKET).mkdir(parents=True)  # a directory of a single drive is a bucket
    words = run([program, "--version"], timeout_s=20).split()
    minio = Minio(
        f"http://{address}:{_PORT}", "torpor-bench", secrets.token_hex(16), " ".join(words[:3])
    )
    log = directory.with_suffix(".log")
    process = spawn(
        [
            *("setpriv", "--pdeathsig", "KILL", "nsenter", f"--net={namespace}"),
            *(program, "server", "--quiet", "--address", f"{address}:{_PORT}", directory),
        ],
        log=log,
        cwd=directory,
        env={
            "HOME": str(directory),
            "MINIO_ROOT_USER": minio.user,
            "MINIO_ROOT_PASSWORD": minio.password,
            "MINIO_BROWSER": "off",
        },
    )
    try:
        _wait_ready(process, minio, namespace, log)
        yield minio
    finally:
        process.kill()


def _wait_ready(process: ProcessId, minio: Minio, namespace: Path, log: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while not inside(namespace, lambda: _answers(minio)):
        checkpoint()
        if process.wait(timeout_s=_LOOK_S) or time.monotonic() > deadline:
            words = log.read_text(errors="replace").strip().splitlines()[-8:]
            raise HostUnfit("MinIO did not start", reason="\n".join(words))


def _answers(minio: Minio) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{minio.endpoint}/minio/health/ready", timeout=2):
            return True
    except OSError:
        return False
