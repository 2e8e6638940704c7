"""Nodes by path, interruptions, and who may push."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from torpor.errors import HostUnfit, InternalError, InvalidInput
from torpor.host.fuse.connection import Connection
from torpor.host.fuse.files import Call, Data, Node, Tree, node_id
from torpor.host.fuse.layouts import InitFlag
from torpor.host.fuse.protocol import Negotiated
from torpor.host.fuse.server import Server, _Calls


class EmptyFiles(Tree):
    """Files without bytes."""

    def read(self, node: Node, offset: int, length: int, call: Call, /) -> Data:
        """Zeros."""
        return bytes(length)


def test_ids_follow_from_paths() -> None:
    """Two trees that were filled in another order give the same ids, all above 2 and below 2^63."""
    paths = [("snapshots", name, "memory") for name in ("one", "two", "three")]
    trees = Tree(), Tree()
    for path in paths:
        trees[0].add(path, size_bytes=5)
    for path in reversed(paths):
        trees[1].add(path, size_bytes=5)
    for path in paths:
        for depth in range(1, 4):
            ids = {tree.node(node_id(path[:depth])).id for tree in trees}
            assert ids == {node_id(path[:depth])}
            assert 2 < min(ids) < 1 << 63


def test_directories_come_and_go_with_their_files() -> None:
    """A directory is there as long as a file is in it; the root stays."""
    tree = Tree()
    root = tree.node(1)
    tree.add(["a", "b", "one"], size_bytes=1)
    tree.add(["a", "two"], size_bytes=1)
    tree.remove(["a", "b", "one"])
    assert [node.name for node in tree.entries(tree.lookup(root, "a"))] == ["two"]
    tree.remove(["a", "two"])
    assert tree.entries(root) == []
    with pytest.raises(FileNotFoundError):
        tree.lookup(root, "a")
    with pytest.raises(OSError, match="Stale") as caught:
        tree.node(node_id(["a"]))
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(FileNotFoundError):
        tree.remove(["a", "two"])


def test_same_file_again() -> None:
    """Adding a file twice changes nothing; another size or kind is refused."""
    tree = Tree()
    first = tree.add(["a", "memory"], size_bytes=5)
    assert tree.add(["a", "memory"], size_bytes=5) is first
    with pytest.raises(InvalidInput, match="a/memory is there already"):
        tree.add(["a", "memory"], size_bytes=6)
    with pytest.raises(InvalidInput, match="a is there already"):
        tree.add(["a"], size_bytes=5)
    with pytest.raises(InvalidInput, match="a/memory is there already"):
        tree.add(["a", "memory", "b"], size_bytes=5)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0", "ä" * 128])
def test_names_that_cannot_be(name: str) -> None:
    """A name that no directory entry can have is refused."""
    with pytest.raises(InvalidInput, match="file name"):
        Tree().add([name], size_bytes=1)


def test_interruption_before_and_after() -> None:
    """Watchers of a call are told once, also when they come late."""
    call, told = Call(), []
    call.on_interrupt(lambda: told.append("early"))
    call.interrupt()
    call.interrupt()
    call.on_interrupt(lambda: told.append("late"))
    assert told == ["early", "late"]
    assert call.interrupted


@pytest.mark.parametrize("sent_again", [0, 1 << 63])
def test_interrupt_that_overtakes_its_request(sent_again: int) -> None:
    """An INTERRUPT fetched by another thread before the request was put down still reaches it."""
    calls = _Calls(lambda: None)
    calls.interrupt(42 | sent_again)
    call = calls.begin(42)
    assert call.interrupted
    calls.end(42, call)
    other, twice = calls.begin(44), calls.begin(44)
    assert not other.interrupted
    calls.interrupt(44)
    assert other.interrupted
    assert twice.interrupted
    calls.end(44, other)
    calls.end(44, twice)
    assert not calls.begin(44).interrupted


def test_early_interrupts_are_bounded() -> None:
    """Interruptions of requests that never come do not pile up."""
    calls = _Calls(lambda: None)
    for unique in range(0, 10000, 2):
        calls.interrupt(unique)
    assert len(calls._early) == 1024


def connection(flags: InitFlag) -> Connection:
    """A connection that nothing is behind."""
    return Connection((-1,), Path("/nowhere"), Negotiated(40, flags, 131072))


def test_main_thread_must_not_push() -> None:
    """A push from the main thread is refused: stuck in it, nobody would see the process killed."""
    tree = EmptyFiles()
    node = tree.add(["memory"], size_bytes=4096)
    server = Server(connection(InitFlag(0)), tree)
    with pytest.raises(InternalError, match="MainThread must not push"):
        server.store(node, 0, bytes(4096))
    with pytest.raises(InternalError, match="MainThread must not push"):
        server.invalidate(node)


def test_kernel_without_resend() -> None:
    """Where requests cannot be sent again, the error says so and what to do."""
    with pytest.raises(HostUnfit, match="FUSE_HAS_RESEND") as caught:
        connection(InitFlag(0)).resend()
    assert "unmount" in caught.value.hint


@pytest.mark.parametrize("text", ["", "{}", '{"descriptors": "x"}'])
def test_text_that_is_no_connection(text: str) -> None:
    """Adopting something else is refused."""
    with pytest.raises(InvalidInput, match="not a FUSE connection"):
        Connection.adopt(text)


def test_descriptors_that_are_no_device(tmp_path: Path) -> None:
    """Adopting descriptors of other files, or closed ones, is refused by number."""
    text = connection(InitFlag(0)).describe()
    with (tmp_path / "file").open("w") as file, pytest.raises(InvalidInput, match="/dev/fuse"):
        Connection.adopt(text, descriptors=[file.fileno()])
    with pytest.raises(InvalidInput, match="is not open"):
        Connection.adopt(text, descriptors=[9999])
