"""Forged content that fits together: every seal, hash and link is right, the content is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import blake3
import pytest

from fixtures.exchange import assert_same
from fixtures.garbage import garbage, leaves, replaced, value_at
from fixtures.spoiling import refuse
from torpor.errors import Conflict, Damaged, DataError, Incompatible, NoSpace
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from fixtures.exchange import Exchange, TestNode
    from fixtures.forging import Forger
    from fixtures.spoiling import Pushed

pytestmark = pytest.mark.slow


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
    error = refuse(pushed.exchange, node, f"packs/{packs[pack].hex()}")
    assert "disagree" in str(error)


def test_wake_object_beyond_any(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """A wake object of a length that none has is refused by what points to it."""
    forger.late["snapshot"] = lambda record: replaced(record, ("wake", "size_bytes"), 1 << 40)
    forger.wake["files"]["vmstate"][2][0][2] = 1 << 33
    forger.publish()
    refuse(pushed.exchange, node, forger.manifest_key)


def test_expected_digest(pushed: Pushed, node: TestNode, forger: Forger) -> None:
    """Who knows which snapshot it wants is not given another, even by who has the key."""
    forger.manifest["created_ns"] = 7
    forger.publish()
    with pytest.raises(Conflict, match="points to snapshot"):
        pushed.exchange.pull(node=node, expect=pushed.exchange.function.digest)
    assert node.left_over() == []


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
