"""Archives as stores: what a push may do while one is written, and how they end."""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING

import pytest

from torpor.errors import (
    Damaged,
    InvalidInput,
    ObjectConflict,
    ObjectMissing,
    StoreDenied,
    StoreError,
)
from torpor.snapshot.repository.archive import ArchiveReader, ArchiveWriter
from torpor.store.interface import Absent, Etag

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def written() -> bytearray:
    """The bytes of an archive."""
    return bytearray()


@pytest.fixture
def writer(written: bytearray) -> ArchiveWriter:
    """An archive that is being written to memory."""
    return ArchiveWriter(written.extend)


def reader(path: Path, data: bytes) -> ArchiveReader:
    """An archive as a file. The descriptor lives as long as the test process."""
    path.write_bytes(data)
    return ArchiveReader(os.open(path, os.O_RDONLY), str(path))


def test_round_trip(writer: ArchiveWriter, written: bytearray, tmp_path: Path) -> None:
    """What was put is read back, whole and in ranges, listed by key."""
    objects = {"packs/b": b"x" * 1000, "packs/a": b"", "refs/f": bytes(512)}
    for key, data in objects.items():
        writer.put(key, data)
    assert writer.finish() == len(written)
    store = reader(tmp_path / "x.tar", bytes(written))
    for key, data in objects.items():
        assert store.get(key, limit_bytes=1000)[0] == data
        assert store.head(key).size_bytes == len(data)
    assert [info.key for info in store.list("packs/")] == ["packs/a", "packs/b"]
    assert [info.key for info in store.list("")] == ["packs/a", "packs/b", "refs/f"]
    assert store.get_range("packs/b", 990, 10) == b"x" * 10
    assert store.get_prefix("packs/b", 5000)[0] == objects["packs/b"]


def test_reader_keeps_to_members(writer: ArchiveWriter, written: bytearray, tmp_path: Path) -> None:
    """No range leaves its object, nothing is larger than allowed, nothing can be changed."""
    writer.put("packs/a", b"12345")
    writer.put("packs/b", b"67890")
    writer.finish()
    store = reader(tmp_path / "x.tar", bytes(written))
    with pytest.raises(Damaged, match="too short"):
        store.get_range("packs/a", 3, 3)
    with pytest.raises(Damaged, match="too large"):
        store.get("packs/a", limit_bytes=4)
    with pytest.raises(InvalidInput):
        store.get_range("packs/a", -1, 3)
    with pytest.raises(ObjectMissing):
        store.head("packs/c")
    with pytest.raises(ObjectMissing):
        store.head("torpor-archive")
    with pytest.raises(StoreDenied):
        store.put("packs/c", b"")
    with pytest.raises(StoreDenied):
        store.delete("packs/a")


def test_nothing_is_written_twice(writer: ArchiveWriter, written: bytearray) -> None:
    """An object can be put once, a ref too, and never replaced by its etag."""
    writer.put("packs/a", b"1")
    etag = writer.put("refs/f", b"1", condition=Absent())
    length = len(written)
    for key, condition in (("packs/a", None), ("refs/f", Absent()), ("refs/f", Etag(etag))):
        with pytest.raises(ObjectConflict):
            writer.put(key, b"2", condition=condition)
    with pytest.raises(StoreDenied):
        writer.delete("packs/a")
    with pytest.raises(StoreError, match="still being written"):
        writer.get("packs/a", limit_bytes=10)
    assert len(written) == length


def test_leases_are_not_written(writer: ArchiveWriter, written: bytearray) -> None:
    """A push renews and deletes its lease; the file knows nothing of it."""
    length = len(written)
    for beat in (b"1", b"2"):
        writer.put("leases/x", beat)
    assert list(writer.list("leases/")) == []
    writer.delete("leases/x")
    assert len(written) == length


def test_members_are_the_same_wherever_they_are_written(
    writer: ArchiveWriter, written: bytearray
) -> None:
    """No time, user or host of the writer is in the file."""
    writer.put("packs/a", b"1")
    writer.finish()
    with tarfile.open(fileobj=io.BytesIO(written)) as tar:
        for member in tar.getmembers():
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert (member.mtime, member.mode) == (0, 0o600)
