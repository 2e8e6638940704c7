"""Streams: parts of unknown number in bounded memory, and what is left of those that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.faulty_http import FaultyProxy, Spoil
from torpor.errors import ObjectMissing, StoreUnreachable
from torpor.store.stack import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fixtures.minio import MinioServer
    from torpor.config import Settings

pytestmark = [pytest.mark.minio, pytest.mark.slow]

MIB = 1 << 20
PART = os.urandom(MIB)
PARTS = 18
WHOLE = PART * PARTS


class Again:
    """Parts that can be iterated again, and count how often they were."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[bytes]:
        self.times += 1
        return iter([PART] * PARTS)


@pytest.mark.parametrize("kind", ["status", "reset request", "lost answer"])
@pytest.mark.parametrize(
    ("method", "target"), [("POST", "?uploads"), ("PUT", "partNumber=2"), ("PUT", "partNumber=3")]
)
def test_a_part_that_fails_in_passing_is_repeated_alone(
    proxied: Settings,
    proxy: FaultyProxy,
    minio_server: MinioServer,
    kind: str,
    method: str,
    target: str,
) -> None:
    """A stream that cannot begin anew survives failures of single parts, twice in a row."""
    before = minio_server.unfinished_uploads()
    proxy.spoil(Spoil(kind, method=method, target=target, times=2))
    store = open_store(proxied)
    store.put_stream("s", iter([PART] * PARTS))
    assert store.get("s", limit_bytes=len(WHOLE))[0] == WHOLE
    assert [hit for *_, hit in proxy.seen].count(kind) == 2
    # an upload whose very first answer was lost has no name: the bucket's lifecycle removes it
    nameless = 2 if (method, kind) == ("POST", "lost answer") else 0
    assert len(minio_server.unfinished_uploads() - before) == nameless


@pytest.mark.parametrize(
    "kind", ["status", "reset request", "lost answer", "reset answer", "truncate answer"]
)
def test_the_last_answer_is_lost(
    proxied: Settings, proxy: FaultyProxy, minio_server: MinioServer, kind: str
) -> None:
    """A stream that cannot begin anew is whole in the end, whatever became of its completion."""
    before = minio_server.unfinished_uploads()
    proxy.spoil(Spoil(kind, method="POST", target="uploadId=", times=2))
    store = open_store(proxied)
    store.put("s", b"before")
    store.put_stream("s", iter([PART] * PARTS))
    assert store.get("s", limit_bytes=len(WHOLE))[0] == WHOLE
    assert minio_server.unfinished_uploads() == before


@pytest.mark.parametrize("other", [b"his", WHOLE])
def test_anothers_object_is_not_taken_for_the_streams(
    proxied: Settings, proxy: FaultyProxy, minio_server: MinioServer, other: bytes
) -> None:
    """If the upload is gone and the object is another's, even of equal size, it was not written."""

    def abort_and_write() -> None:
        (upload,) = minio_server.unfinished_uploads() - before
        shutil.rmtree(minio_server.uploads / upload)
        open_store(replace(proxied, s3_endpoint=minio_server.settings.s3_endpoint)).put("s", other)

    before = minio_server.unfinished_uploads()
    proxy.spoil(Spoil("do", method="POST", target="uploadId=", action=abort_and_write))
    with pytest.raises(StoreUnreachable, match="NoSuchUpload"):
        open_store(proxied).put_stream("s", iter([PART] * PARTS))


def test_a_stream_that_can_begin_anew_does(proxied: Settings, proxy: FaultyProxy) -> None:
    """What obstore does not repeat by itself, Retry does from the first part on."""
    proxy.spoil(Spoil("reset answer", method="POST", target="?uploads"))
    parts, store = Again(), open_store(proxied)
    store.put_stream("s", parts)
    assert [hit for _, target, hit in proxy.seen if "?uploads" in target] == ["reset answer", ""]
    assert store.get("s", limit_bytes=len(WHOLE))[0] == WHOLE


def test_a_stream_that_fails_for_good_is_aborted(
    proxied: Settings, proxy: FaultyProxy, minio_server: MinioServer
) -> None:
    """When the budget is used up nothing is visible and no upload is left in the bucket."""
    before = minio_server.unfinished_uploads()
    proxy.spoil(Spoil("status", method="PUT", target="partNumber=2", times=None))
    store = open_store(replace(proxied, store_retry_s=0.3))
    with pytest.raises(StoreUnreachable, match="SlowDown"):
        store.put_stream("s", iter([PART] * PARTS))
    with pytest.raises(ObjectMissing):
        store.head("s")
    assert ("DELETE", "") in [(method, hit) for method, _, hit in proxy.seen]
    assert minio_server.unfinished_uploads() == before


def test_a_source_that_fails_is_aborted(s3_settings: Settings, minio_server: MinioServer) -> None:
    """Parts that end in an error leave no upload, though one was under way."""

    class Gone(Exception):
        """The source's own error."""

    before = minio_server.unfinished_uploads()
    under_way: set[str] = set()

    def parts() -> Iterator[bytes]:
        for _ in range(PARTS):
            yield PART
        under_way.update(minio_server.unfinished_uploads() - before)
        raise Gone

    with pytest.raises(Gone):
        open_store(s3_settings).put_stream("s", parts())
    assert len(under_way) == 1
    assert minio_server.unfinished_uploads() == before


def test_a_source_that_fails_while_the_store_is_away(proxied: Settings, proxy: FaultyProxy) -> None:
    """The source's error comes through even if the upload cannot be aborted."""

    class Gone(Exception):
        """The source's own error."""

    def parts() -> Iterator[bytes]:
        yield from [PART] * PARTS
        proxy.spoil(Spoil("status", times=None))
        raise Gone

    with pytest.raises(Gone):
        open_store(replace(proxied, store_retry_s=0.1)).put_stream("s", parts())


PROGRAM = """
import json, sys
from torpor.config import Settings
from torpor.store.stack import open_store

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

store = open_store(Settings(**json.loads(sys.argv[1])))
size, count = int(sys.argv[2]), int(sys.argv[3])
store.put_stream("first", iter([bytes(size)] * 4))
before = peak_bytes()
store.put_stream("big", (bytes(size) for _ in range(count)))
print(peak_bytes() - before)
assert store.head("big").size_bytes == size * count
"""


@pytest.mark.parametrize("part_bytes", [100_000, 24 * MIB])
@pytest.mark.parametrize("backend", ["file", "s3"])
def test_memory_is_bounded(
    s3_settings: Settings, tmp_path: Path, backend: str, part_bytes: int
) -> None:
    """A stream of 240 MiB takes a few parts of memory more than a short one."""
    chosen = {"store": f"file://{tmp_path}/store"}
    if backend == "s3":
        names = ("store", "s3_endpoint", "s3_access_key_id", "s3_secret_access_key")
        chosen = {name: getattr(s3_settings, name) for name in names}
    count = 240 * MIB // part_bytes
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(chosen), str(part_bytes), str(count)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tempfile.gettempdir(),
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 80 * MIB
