"""Forged content that fits together: every seal, hash and link is right, the content is not."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import blake3
import pytest
import zstandard

from fixtures.exchange import assert_same
from fixtures.forging import Forger
from fixtures.garbage import garbage, leaves, replaced, value_at
from fixtures.spoiling import kept, refuse
from torpor.errors import Conflict, Damaged, DataError, Incompatible, NoSpace, ObjectMissing
from torpor.snapshot.repository.chunks import LONGEST_BYTES, encode
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fixtures.exchange import Exchange, TestNode
    from fixtures.spoiling import Pushed


@pytest.fixture
def forger(pushed: Pushed) -> Iterator[Forger]:
    """The pushed function in the hands of a forger; all is put back afterwards."""
    with kept(pushed.exchange):
        yield Forger(pushed.exchange.store, pushed.exchange.keyring.current)


def test_untouched(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """What the forger writes without changing anything is pulled: he makes no mistakes."""
    forger.publish()
    assert_same(pushed.exchange.pull(node=node), pushed.exchange.function)


def test_any_field_of_the_nodes_manifest(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A manifest with garbage in any field is refused, or describes what then arrived."""
    honest = forger.manifest
    for leaf in [*leaves(honest)]:
        good = value_at(honest, leaf)
        for bad in garbage(good):
            if bad == good or isinstance(bad, bytes):
                continue
            forger.manifest = replaced(honest, leaf, bad)
            try:
                forger.publish()
            except (UnicodeEncodeError, OverflowError):
                continue
            _pull_or_refuse(pushed.exchange, node, forger.manifest_key)


def test_newer_manifest(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A manifest of a later format is said to be that, and of which snapshot."""
    forger.manifest = b'{"format":2,"more":[]}'
    forger.publish()
    with pytest.raises(Incompatible, match=f"{forger.ref['snapshot'][:12]} has format 2"):
        pushed.exchange.pull(node=node)
    assert node.left_over() == []


def _pull_or_refuse(exchange: Exchange, node: TestNode, key: str) -> None:
    refused: DataError | None = None
    try:
        arrived = exchange.pull(node=node)
    except (Damaged, Incompatible) as error:
        refused = error
    if refused is None:
        node.snapshots.verify(arrived.digest)
        node.snapshots.remove(arrived.digest)
        return
    folder = key.rsplit("/", 2)[0]
    named = "has format" if isinstance(refused, Incompatible) else f"object {folder}"
    assert named in str(refused)
    assert [name for name in node.left_over() if not name.startswith("image-")] == []


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"{",
        b"null",
        b'{"format":1}',
        b'{"format":1,"x":' + b"[" * 100_000,
        b'{"format":1,"kind":"\xff\xfe"}',
        b'{"format":1' + b"0" * 5000 + b"}",
        b"\0" * 100,
    ],
)
def test_no_manifest(pushed: Pushed, node: TestNode, forger: Forger, encoded: bytes) -> None:
    """What is no manifest at all is refused by the name of the record that holds it."""
    forger.manifest = encoded
    forger.publish()
    error = refuse(pushed.exchange, node, forger.manifest_key)
    assert "manifest" in str(error)


@pytest.mark.parametrize("name", ["memory", "disk"])
def test_bytes_outside_the_extents(
    pushed: Pushed, node: TestNode, forger: Forger, name: str
) -> None:
    """Content that the manifest's digest does not cover is refused: it would run unseen.

    The forger keeps the map and every chunk, and leaves some pages out of the extents.
    """
    file = pushed.exchange.function.directory / name
    extents = forger.manifest[name]["extents"][1:]
    _describe(forger, name, file.read_bytes(), extents)
    forger.publish()
    error = refuse(pushed.exchange, node, forger.manifest_key)
    assert f"{name} has another content" in str(error)


def test_other_bytes_in_the_extents(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """Content that is not what the manifest's digest covers is refused."""
    for name in ("memory", "disk", "vmstate"):
        honest = forger.manifest[name]["digest"]
        forger.manifest[name]["digest"] = honest[::-1]
        forger.publish()
        error = refuse(pushed.exchange, node, forger.manifest_key)
        assert f"{name} has another content" in str(error)
        forger.manifest[name]["digest"] = honest


@pytest.mark.parametrize("size_bytes", [2**44 + WINDOW_BYTES, 2**62, 2**80])
def test_memory_beyond_any_machine(
    pushed: Pushed, node: TestNode, forger: Forger, size_bytes: int
) -> None:
    """Sizes that agree everywhere but cannot be are refused before a file is made."""
    _resize(forger, size_bytes)
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


def test_memory_of_a_terabyte(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A size that can be costs only its data, whatever else the node holds."""
    _resize(forger, 1 << 40)
    forger.publish()
    arrived = pushed.exchange.pull(node=node)
    assert arrived.memory.stat().st_size == 1 << 40
    assert arrived.disk_usage_bytes() < 16 * 1024 * 1024


def test_more_data_than_the_disk_has(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A manifest that claims more data than fits here is refused before anything is fetched."""
    size_bytes = 1 << 43
    _resize(forger, size_bytes)
    forger.manifest["memory"]["extents"] = [[0, size_bytes]]
    forger.publish()
    with pytest.raises(NoSpace, match="are free"):
        pushed.exchange.pull(node=node)
    assert node.left_over() == []


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("machine", "vcpus", 0),
        ("machine", "vcpus", 5000),
        ("machine", "app_bytes", -1),
        ("machine", "app_bytes", 2**63),
        ("platform", "page_bytes", 0),
        ("function", "revision", -1),
        ("function", "port", 0),
        ("function", "port", 65536),
        ("function", "name", "../f"),
        ("function", "app", "../../etc"),
        ("platform", "kernel", "/boot/vmlinuz"),
    ],
)
def test_what_no_machine_or_function_has(
    pushed: Pushed, node: TestNode, forger: Forger, part: str, name: str, value: int | str
) -> None:
    """Numbers and names that would only be found out at a restore are refused before."""
    forger.manifest[part][name] = value
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


@pytest.mark.parametrize("created_ns", [-1, 2**63, 2**80])
def test_time_that_is_none(pushed: Pushed, node: TestNode, forger: Forger, created_ns: int) -> None:
    """A time that no clock shows is refused."""
    forger.manifest["created_ns"] = created_ns
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


def test_larger_vmstate(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """Device state of a size that no VMM writes is refused, however much of it is zeros."""
    size_bytes = (1 << 30) + 1
    forger.manifest["vmstate"]["size_bytes"] = size_bytes
    forger.wake["files"]["vmstate"][0] = size_bytes
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


def test_image_with_another_content(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """An image under another's digest is refused, and the good one beside it is not kept."""
    forger.images[0]["content"], forger.images[1]["content"] = (
        forger.images[1]["content"],
        forger.images[0]["content"],
    )
    forger.publish()
    refuse(pushed.exchange, node, forger.image_keys[0])


def test_only_the_second_image_is_wrong(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A wrong image keeps the snapshot's other images from being taken too."""
    forger.images[1]["content"] = forger.images[0]["content"]
    forger.publish()
    refuse(pushed.exchange, node, forger.image_keys[1])


def test_one_file_as_image_and_app(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A manifest that names one image twice fetches it once."""
    forger.manifest["function"]["app"] = forger.manifest["image"]
    image = next(
        image for image in forger.snapshot["images"] if image["digest"] == forger.manifest["image"]
    )
    position = forger.snapshot["images"].index(image)
    forger.images = [forger.images[position]] * 2
    forger.image_keys = [forger.image_keys[position]] * 2
    forger.snapshot["images"] = [dict(image), dict(image)]
    forger.publish()
    assert pushed.exchange.pull(node=node).manifest.image in node.images


def test_other_images_than_the_manifests(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A record whose images are not the manifest's is refused."""
    forger.snapshot["images"][0]["digest"] = "0" * 64
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


def test_two_maps_disagree(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A place that is one chunk for memory and another for the disk is refused by its pack."""
    del forger.wake["files"]["disk"]
    _, packs, runs = forger.snapshot["memory"]
    _, pack, offset, lengths, ids = runs[0]
    forger.snapshot["disk"] = [
        forger.manifest["disk"]["size_bytes"],
        [packs[pack]],
        [[0, 0, offset, lengths[:2], ids[:32][::-1]]],
    ]
    forger.publish()
    refuse(pushed.exchange, node, f"packs/{packs[pack].hex()}")


def test_expected_digest(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """Who knows which snapshot it wants is not given another, even by who has the key."""
    forger.manifest["created_ns"] = 7
    forger.publish()
    with pytest.raises(Conflict, match="points to snapshot"):
        pushed.exchange.pull(node=node, expect=pushed.exchange.function.digest)
    assert node.left_over() == []


# chunks

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


def _describe(forger: Forger, name: str, content: bytes, extents: list[list[int]]) -> None:
    hasher = blake3.blake3()
    for offset, length in extents:
        hasher.update(content[offset : offset + length])
    forger.manifest[name]["extents"] = extents
    forger.manifest[name]["digest"] = hasher.hexdigest()


def _resize(forger: Forger, size_bytes: int) -> None:
    forger.manifest["memory"]["size_bytes"] = size_bytes
    forger.manifest["machine"]["memory_bytes"] = size_bytes
    forger.snapshot["memory"][0] = min(size_bytes, 2**64 - 1)
