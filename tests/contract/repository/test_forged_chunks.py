"""Forged chunks: sealed and named as they should be, with garbage inside."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from fixtures.exchange import assert_same
from fixtures.spoiling import little_memory, refuse
from torpor.errors import ObjectMissing
from torpor.snapshot.repository.chunks import LONGEST_BYTES, encode
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.exchange import TestNode
    from fixtures.forging import Forger
    from fixtures.spoiling import Pushed

LONG = bytes(range(256)) * 65  # longer than a window


def _frame(content: bytes, **options: Any) -> bytes:  # noqa: ANN401
    return b"\x01" + zstandard.ZstdCompressor(level=1, **options).compress(content)


def _claiming(size: int) -> bytes:
    """A frame header that claims so many bytes, and a block of zeros."""
    return b"\x01" + struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + b"\x03\x00\x00\x00"


CHUNKS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "only an encoding": lambda _: b"\x01",
    "unknown encoding": lambda data: b"\x02" + data,
    "another unknown encoding": lambda data: b"\xff" + data,
    "not compressed though it says so": lambda data: b"\x01" + data,
    "compressed though it does not say so": lambda data: b"\x00" + _frame(data)[1:],
    "a frame without its size": lambda data: _frame(data, write_content_size=False),
    "a frame cut off": lambda data: _frame(data)[:-3],
    "bytes behind the frame": lambda data: _frame(data) + b"more",
    "two frames": lambda data: _frame(data) + _frame(data)[1:],
    "a longer frame": lambda _: _frame(LONG),
    "a longer content": lambda _: b"\x00" + LONG[:LONGEST_BYTES],
    "a claim of a GiB": lambda _: _claiming(1 << 30),
    "a claim of more than there is": lambda _: _claiming((1 << 64) - 1),
    "a shorter content": lambda data: b"\x00" + data[:-1],
    "another content": lambda data: b"\x00" + data[::-1],
    "a dictionary's frame": lambda data: b"\x01\x28\xb5\x2f\xfd\x23\x01\x02\x03\x04" + data[:90],
    "a skippable frame": lambda _: b"\x01\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
}


@pytest.mark.parametrize("what", CHUNKS)
def test_chunk(pushed: Pushed, node: TestNode, forger: Forger, what: str) -> None:
    """A sealed chunk with garbage in it is refused by the name of its pack.

    One of a length that no chunk has is refused by the name of the record with that length.
    """
    content = bytes(WINDOW_BYTES - 1) + b"\1"
    sealed, chunk_id = forger.seal(content, encoded=CHUNKS[what](content))
    key = forger.replace_chunk(sealed, chunk_id)
    forger.publish()
    possible = 0 < len(sealed) <= LONGEST_BYTES
    with little_memory():
        refuse(pushed.exchange, node, key if possible else forger.manifest_key)


@pytest.mark.parametrize("length", [0, 1, WINDOW_BYTES - 1, WINDOW_BYTES + 1])
def test_chunk_of_another_length(
    pushed: Pushed, node: TestNode, forger: Forger, length: int
) -> None:
    """A chunk that is what its id says, but not as long as its window, is refused."""
    key = forger.replace_chunk(*forger.seal(b"\1" * length))
    forger.publish()
    refuse(pushed.exchange, node, key)


def test_honest_chunk_of_another_content(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A chunk that is sound, but not of this snapshot, is refused by the manifest's digest."""
    forger.replace_chunk(*forger.seal(LONG[:WINDOW_BYTES]))
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


@pytest.mark.parametrize("way", ["stored", "compressed"])
def test_the_forgers_chunk_is_taken_when_right(
    pushed: Pushed, node: TestNode, forger: Forger, way: str
) -> None:
    """Either encoding of the right content arrives, from a pack that the forger made."""
    content = pushed.exchange.function.memory.read_bytes()[:WINDOW_BYTES]
    encoded = b"\x00" + content if way == "stored" else encode(content, level=19)
    forger.replace_chunk(*forger.seal(content, encoded=encoded))
    forger.publish()
    assert_same(pushed.exchange.pull(node=node), pushed.exchange.function)


def test_missing_forged_pack(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A map into a pack that is not there is refused by the pack's name."""
    content = pushed.exchange.function.memory.read_bytes()[:WINDOW_BYTES]
    key = forger.replace_chunk(*forger.seal(content))
    forger.publish()
    forger.store.delete(key)
    assert isinstance(refuse(pushed.exchange, node, key), ObjectMissing)
