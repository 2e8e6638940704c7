"""Archives of any content come back; no bytes in place of one make the reader fail otherwise."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.errors import DataError
from torpor.snapshot.repository.archive import ArchiveReader, ArchiveWriter

KEYS = st.from_regex(r"(packs|index|refs)/[a-z0-9]{1,40}", fullmatch=True)
OBJECTS = st.dictionaries(KEYS, st.binary(max_size=2000), max_size=6)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4)


def archive_of(objects: dict[str, bytes]) -> bytearray:
    """The bytes of an archive."""
    written = bytearray()
    writer = ArchiveWriter(written.extend)
    for key, data in objects.items():
        writer.put(key, data)
    writer.finish()
    return written


def read(data: bytes) -> dict[str, bytes]:
    """The objects that a reader finds in a file of these bytes."""
    descriptor = os.memfd_create("archive")
    try:
        os.write(descriptor, data)
        reader = ArchiveReader(descriptor, "x.tar")
        return {info.key: reader.get(info.key, limit_bytes=1 << 20)[0] for info in reader.list("")}
    finally:
        os.close(descriptor)


@given(OBJECTS)
def test_round_trip(objects: dict[str, bytes]) -> None:
    """What was put is what is read, by name."""
    assert read(archive_of(objects)) == objects


@given(OBJECTS, CHANGES, st.integers(0, 1 << 20), st.binary(max_size=600))
def test_spoilt(
    objects: dict[str, bytes], changes: list[tuple[int, int]], cut: int, tail: bytes
) -> None:
    """Bytes changed, cut and added anywhere: objects within the file, or a DataError."""
    data = archive_of(objects)
    for place, value in changes:
        data[place % len(data)] = value
    spoilt = bytes(data[: cut % (2 * len(data))]) + tail
    with contextlib.suppress(DataError):
        assert sum(map(len, read(spoilt).values())) <= len(spoilt)


@given(st.binary(max_size=3000))
def test_anything(data: bytes) -> None:
    """Arbitrary bytes are no archive."""
    with pytest.raises(DataError, match=r"x\.tar"):
        read(data)
