"""The pager's socket: requests and answers, errors as what they are, long paths, garbage."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from torpor import errors
from torpor.errors import InternalError, NotFound, TorporError
from torpor.pager import control
from torpor.pager.control import Line, PagerGone, decode_error

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Peer:
    """The other side of a socket: takes one client and does `work` with its connection."""

    def __init__(self, directory: Path, work: Callable[[socket.socket], None]) -> None:
        self._listener = control.listen(directory)
        self._thread = threading.Thread(target=self._run, args=(work,))
        self._thread.start()

    def _run(self, work: Callable[[socket.socket], None]) -> None:
        connection, _ = self._listener.accept()
        with connection:
            work(connection)

    def end(self) -> None:
        """Wait until it is done."""
        self._thread.join(60)
        self._listener.close()


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Callable[[Callable[[socket.socket], None]], Line]]:
    """A line to a peer that does what it is told."""
    ends: list[Callable[[], None]] = []

    def start(work: Callable[[socket.socket], None]) -> Line:
        peer = Peer(tmp_path, work)
        line = control.connect(tmp_path)
        ends.extend((line.close, peer.end))
        return line

    yield start
    for end in ends:
        end()


def answering(*answers: bytes) -> Callable[[socket.socket], None]:
    """A peer that answers each request with given bytes."""

    def work(connection: socket.socket) -> None:
        for answer in answers:
            connection.recv(1 << 16)
            connection.sendall(answer)

    return work


def test_requests_and_answers(talk: Callable[..., Line]) -> None:
    """A request is one line of JSON; its answer comes back, whatever pieces it comes in."""
    received: list[bytes] = []

    def work(connection: socket.socket) -> None:
        received.append(connection.recv(1 << 16))
        for piece in (b'{"ok": {"a"', b": [1, 2]}", b"}\n"):
            connection.sendall(piece)

    assert talk(work).ask("open", reference="f", here=["x"]) == {"a": [1, 2]}
    assert received == [b'{"op":"open","reference":"f","here":["x"]}\n']


CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, TorporError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_errors_travel_as_what_they_are(kind: type[TorporError]) -> None:
    """Class, message, reason and hint of every error of the tree come out as they went in."""
    sent = kind("what happened", reason="why", hint="what to do")
    received = decode_error(sent.to_dict())
    assert type(received) is kind
    assert received.to_dict() == sent.to_dict()


@pytest.mark.parametrize("name", ["annotations", "ClassVar", "KeyError", "", "__builtins__"])
def test_errors_that_are_none(name: str) -> None:
    """A name that is no error of the tree is an error of ours."""
    assert type(decode_error({"error": name, "message": "m"})) is InternalError


def test_an_error_is_raised(talk: Callable[..., Line]) -> None:
    """What the pager answered with is raised where it was asked."""
    line = talk(answering(b'{"error":{"error":"NotFound","message":"no f","reason":"r"}}\n'))
    with pytest.raises(NotFound, match="no f: r"):
        line.ask("open")


@pytest.mark.parametrize("garbage", [b"hello\n", b"[1]\n", b'"x"\n', b"{\n", b"\xff\xfe\n"])
def test_garbage(talk: Callable[..., Line], garbage: bytes) -> None:
    """A line that is no JSON object is an error, not a wrong answer."""
    with pytest.raises(InternalError, match="another language"):
        talk(answering(garbage)).ask("open")


@pytest.mark.parametrize("cut", [b"", b'{"ok"', b'{"ok": {}}'])
def test_a_pager_that_ends(talk: Callable[..., Line], cut: bytes) -> None:
    """Half an answer, or none, is that the pager is gone."""
    with pytest.raises(PagerGone, match="asked to open"):
        talk(answering(cut)).ask("open")


def test_a_pager_that_is_gone(talk: Callable[..., Line]) -> None:
    """Asking on a connection whose other end has closed is that too."""
    line = talk(lambda connection: None)
    assert line.receive() is None
    with pytest.raises(PagerGone):
        line.send({"op": "x", "data": "x" * 1_000_000})


def test_paths_longer_than_a_socket_may_have(tmp_path: Path) -> None:
    """A home deep in the file system has a socket like any other; a new one replaces the old."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    control.listen(deep).close()
    with pytest.raises(PagerGone, match="no pager answers"):
        control.connect(deep)
    listener = control.listen(deep)
    control.connect(deep).close()
    listener.close()


def test_nothing_there(tmp_path: Path) -> None:
    """Without a socket, or without its directory, no pager answers."""
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PagerGone):
            control.connect(directory)


def test_a_pager_that_hangs(tmp_path: Path) -> None:
    """A connection with a limit gives up on a pager that does not answer."""
    listener = control.listen(tmp_path)
    line = control.connect(tmp_path, timeout_s=0.1)
    with pytest.raises(PagerGone):
        line.ask("hello")
    line.close()
    listener.close()
