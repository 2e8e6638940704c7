"""The API's bytes, and what becomes of every kind of answer."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.errors import NoSpace, VmmFailed
from torpor.vmm.firecracker.api import Api, Head, decode_answer, decode_head, encode_request
from torpor.vmm.firecracker.requests import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REQUEST = Request("PUT", "/vm", {"state": "Paused"})


def test_request() -> None:
    """HTTP/1.1 with the length of its JSON body."""
    assert encode_request(REQUEST) == (
        b"PUT /vm HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        b'Content-Type: application/json\r\nContent-Length: 18\r\n\r\n{"state":"Paused"}'
    )
    assert encode_request(Request("GET", "/")).endswith(b"Accept: application/json\r\n\r\n")


def test_answers() -> None:
    """204 brings nothing, 200 a document, anything else an error with Firecracker's words."""
    assert decode_head(b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n") == Head(204, 0)
    assert decode_head(b"HTTP/1.1 200 \r\ncontent-length: 7\r\n\r\n") == Head(200, 7)
    assert decode_answer(REQUEST, Head(204, 0), b"") is None
    assert decode_answer(REQUEST, Head(200, 7), b'{"a":1}') == {"a": 1}
    with pytest.raises(VmmFailed, match="Firecracker refused PUT /vm: no such thing"):
        decode_answer(REQUEST, Head(400, 9), b'{"fault_message":"no such thing"}')
    with pytest.raises(VmmFailed, match="not JSON at all"):
        decode_answer(REQUEST, Head(400, 9), b"not JSON at all")
    with pytest.raises(VmmFailed, match="status 500"):
        decode_answer(REQUEST, Head(500, 0), b"")
    full = b'{"fault_message":"Cannot write: No space left on device (os error 28)"}'
    with pytest.raises(NoSpace, match="os error 28"):
        decode_answer(REQUEST, Head(400, 9), full)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_an_error(data: bytes) -> None:
    """Nothing but VmmFailed comes of nonsense, and no length that nobody can hold."""
    with contextlib.suppress(VmmFailed):
        assert decode_head(data).length <= 1 << 20


@given(st.integers(100, 599), st.binary(max_size=200))
def test_any_body_is_an_answer_or_an_error(status: int, body: bytes) -> None:
    """The same for bodies."""
    with contextlib.suppress(VmmFailed, NoSpace):
        decode_answer(REQUEST, Head(status, len(body)), body)


@contextlib.asynccontextmanager
async def answering(path: Path, answer: bytes) -> AsyncIterator[None]:
    """A server that answers every request with these bytes and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        with contextlib.suppress(OSError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "lost the connection to Firecracker at PUT /vm"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "lost the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", "lost the connection"),
        (b"SSH-2.0 hello\r\n\r\n", "is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "impossible length"),
        (b"x" * 100_000, "lost the connection"),
    ],
)
async def test_broken_answers(tmp_path: Path, answer: bytes, words: str) -> None:
    """A connection that ends, or speaks something else, is a VmmFailed that says where."""
    async with answering(tmp_path / "s", answer):
        with pytest.raises(VmmFailed, match=words):
            await Api(tmp_path / "s").ask(REQUEST)


async def test_kept_connection(tmp_path: Path) -> None:
    """All requests of the body are on it; one that broke is not used again."""
    answers = [b"HTTP/1.1 204 \r\n\r\n", b"HTTP/1.1 400 \r\nContent-Length: 2\r\n\r\nno", b""]
    seen: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            for answer in answers:
                await reader.readuntil(b'"Paused"}')
                seen.append(writer)
                writer.write(answer)

    api = Api(tmp_path / "s")
    with pytest.raises(VmmFailed, match="cannot connect"), api.kept_open():
        pass
    async with await asyncio.start_unix_server(serve, tmp_path / "s"):
        with api.kept_open():
            assert await api.ask(REQUEST) is None
            with pytest.raises(VmmFailed, match="PUT /vm: no"):
                await api.ask(REQUEST)
            with pytest.raises(VmmFailed, match="lost the connection"):
                await api.ask(REQUEST)
            assert await api.ask(REQUEST) is None
        assert await api.ask(REQUEST) is None
    assert len(set(map(id, seen[:3]))) == 1
    assert len(set(map(id, seen))) == 3


async def test_socket_that_is_gone(tmp_path: Path) -> None:
    """No socket, and one that nobody listens at any more."""
    with pytest.raises(VmmFailed, match="No such file"):
        await Api(tmp_path / "s").ask(REQUEST)
    async with answering(tmp_path / "s", b""):
        assert Api(tmp_path / "s").listens()
    with contextlib.suppress(FileNotFoundError):
        assert not Api(tmp_path / "s").listens()
        with pytest.raises(VmmFailed):
            await Api(tmp_path / "s").ask(REQUEST)


async def test_long_path(tmp_path: Path) -> None:
    """A socket whose path is longer than an address holds is reached all the same."""
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    short = tmp_path / "short"
    short.symlink_to(directory)
    async with answering(short / "s", b"HTTP/1.1 204 No Content\r\n\r\n"):
        assert await Api(directory / "s").ask(REQUEST) is None
