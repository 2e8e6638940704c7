"""Snapshots through a store: whole and right, or refused with the object's name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from torpor.config import Settings
from torpor.errors import Damaged, NotFound, ObjectMissing, StoreUnreachable, TorporError
from torpor.host.sparse import blake3_file, nonzero_extents
from torpor.snapshot.local import LocalSnapshots
from torpor.snapshot.manifest import Function, Machine, Platform
from torpor.snapshot.whole import pull, push
from torpor.store.faults import Fault, Faults
from torpor.store.plain import open_plain
from torpor.units import Digest

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.snapshot.local import LocalSnapshot

MEMORY, DISK = 1 << 20, 1 << 19
PLATFORM = Platform(
    "x86_64", "qemu", "7.2", "microvm", "tcg", "max", "", (), 4096, Digest("0" * 64)
)


class Quiet:
    """Progress for nobody."""

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """See Progress."""


class Nodes:
    """Two nodes and a store between them that can fail."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plain = open_plain(Settings(), "memory://")
        self.store = Faults(self.plain)
        self.a = LocalSnapshots(directory / "a")
        self.b = LocalSnapshots(directory / "b")
        self.images = {}
        for name in ("image", "app"):
            path = directory / name
            path.write_bytes(os.urandom(5000))
            os.truncate(path, 20000)
            self.images[blake3_file(path)] = path
        self.adopted: dict[str, bytes] = {}
        self.snapshot = self._make()

    def _make(self) -> LocalSnapshot:
        image, app = self.images
        with self.a.stage() as staging:
            for path, size in ((staging.memory, MEMORY), (staging.disk, DISK)):
                with path.open("wb") as stream:
                    stream.truncate(size)
                    for page in (0, 3, 4, 90):
                        stream.seek(page * 4096)
                        stream.write(os.urandom(4096))
            staging.vmstate.write_bytes(os.urandom(999))
            digest = staging.publish(
                kind="function",
                created_ns=1,
                parent=None,
                platform=PLATFORM,
                machine=Machine(MEMORY, 1, DISK, 20000),
                image=image,
                function=Function("f", 1, 8080, app),
            )
        return self.a.get(digest)

    def push(self, *, zeros: bool = False) -> int:
        """Push from A; the bytes that moved."""
        images = self.images
        report = push(
            self.store, self.snapshot, ref="f", images=images, progress=Quiet(), zeros=zeros
        )
        return report.moved_bytes

    def pull(self, reference: str = "f", *, zeros: bool = False) -> LocalSnapshot:
        """Pull on B."""
        digest, _, _ = pull(
            self.store,
            reference,
            snapshots=self.b,
            adopt_image=self._adopt,
            has_image=self.adopted.__contains__,
            progress=Quiet(),
            zeros=zeros,
        )
        return self.b.get(digest)

    def _adopt(self, path: Path, digest: Digest) -> None:
        if blake3_file(path) != digest:
            raise Damaged(f"image {digest[:12]} is damaged")
        self.adopted[digest] = path.read_bytes()

    def assert_nothing_on_b(self) -> None:
        """Neither a snapshot nor a staging directory."""
        assert list((self.directory / "b").iterdir()) == []


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    """A with a snapshot, B with nothing."""
    return Nodes(tmp_path)


def test_arrives_as_it_was(nodes: Nodes) -> None:
    """Memory, disk, device state and images arrive byte for byte, holes as holes."""
    nodes.push()
    pulled = nodes.pull()
    for name in ("memory", "disk", "vmstate", "manifest.json"):
        ours, theirs = nodes.snapshot.directory / name, pulled.directory / name
        assert ours.read_bytes() == theirs.read_bytes()
    with pulled.memory.open("rb") as stream:
        extents = nonzero_extents(stream.fileno())
    assert tuple(extents) == pulled.manifest.memory.extents
    assert pulled.memory.stat().st_blocks * 512 <= 5 * 4096
    assert nodes.adopted == {digest: path.read_bytes() for digest, path in nodes.images.items()}
    nodes.b.verify(pulled.digest)


def test_with_its_zeros(nodes: Nodes) -> None:
    """Every byte of the memory file travels when that is asked for."""
    assert nodes.push(zeros=True) > MEMORY
    pulled = nodes.pull(zeros=True)
    assert pulled.memory.read_bytes() == nodes.snapshot.memory.read_bytes()
    nodes.b.verify(pulled.digest)


def test_second_push_sends_only_the_manifest(nodes: Nodes) -> None:
    """What is there is not sent again."""
    first = nodes.push()
    assert nodes.push() < first / 10


def test_unknown_ref(nodes: Nodes) -> None:
    """A name that nobody pushed is NotFound."""
    with pytest.raises(NotFound, match="'nobody'"):
        nodes.pull("nobody")


KINDS = ("manifest", "memory", "disk", "vmstate", "image", "app", "ref")


def key_of(nodes: Nodes, kind: str) -> str:
    """The key of an object of a kind."""
    if kind == "ref":
        return "whole/refs/f"
    if kind in ("image", "app"):
        return f"whole/images/{list(nodes.images)[kind == 'app']}"
    return f"whole/snapshots/{nodes.snapshot.digest}/{kind}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "extended", "flipped", "swapped"])
def test_damaged_objects_are_refused(nodes: Nodes, kind: str, damage: str) -> None:
    """Whatever is done to whichever object: an error that names it, and nothing on the node."""
    nodes.push()
    key = key_of(nodes, kind)
    data, _ = nodes.plain.get(key, limit_bytes=1 << 30)
    middle = len(data) // 2
    other = "vmstate" if kind != "vmstate" else "memory"
    changed = {
        "missing": None,
        "truncated": data[:middle],
        "extended": data + b"\0" * 4096,
        "flipped": data[: len(data) // 2]
        + bytes([data[len(data) // 2] ^ 1])
        + data[len(data) // 2 + 1 :],
        "swapped": nodes.plain.get(key_of(nodes, other), limit_bytes=1 << 30)[0],
    }[damage]
    if changed is None:
        nodes.plain.delete(key)
    else:
        nodes.plain.put(key, changed)
    if (kind, damage) == ("ref", "flipped"):  # may now name another snapshot, which is not there
        with pytest.raises((Damaged, NotFound)):
            nodes.pull()
    else:
        with pytest.raises((Damaged, NotFound, ObjectMissing)) as caught:
            nodes.pull()
        known = (kind, nodes.snapshot.digest[:12], key.split("/")[-1][:12], "'f'")
        assert any(name in str(caught.value) for name in known)
    nodes.assert_nothing_on_b()


@pytest.mark.parametrize("operation", ["put", "put_stream", "head"])
def test_push_that_fails_half_way(nodes: Nodes, operation: str) -> None:
    """Before a push is complete the ref does not move; repeated, it succeeds."""
    nodes.store.inject(Fault(operation, "error"))
    with pytest.raises(StoreUnreachable):
        nodes.push()
    with pytest.raises(ObjectMissing):
        nodes.plain.get("whole/refs/f", limit_bytes=999)
    nodes.push()
    nodes.pull()


@pytest.mark.parametrize("kind", KINDS)
def test_pull_that_fails_half_way(nodes: Nodes, kind: str) -> None:
    """A pull that is cut off at any object leaves nothing; repeated, it succeeds."""
    nodes.push()
    operation = "get" if kind in ("manifest", "ref") else "get_range"
    nodes.store.inject(Fault(operation, "error", key=key_of(nodes, kind)))
    with pytest.raises(TorporError):
        nodes.pull()
    nodes.assert_nothing_on_b()
    nodes.pull()
