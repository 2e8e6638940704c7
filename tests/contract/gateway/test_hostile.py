"""Input that is no request, or tries to be two: a table of raw bytes and what becomes of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from fixtures.gateways import Client, Function, TestFleet, connected, listening, serving, wait_for
from torpor.config import Settings
from torpor.snapshot.manifest import Scale

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from torpor.gateway import Gateway

SMUGGLED = b"GET /f/hello/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
GET = b"GET /f/hello/ HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def function() -> AsyncIterator[Function]:
    """A function that counts its requests."""
    async with serving() as function:
        yield function


@pytest.fixture
async def gateway(function: Function) -> AsyncIterator[Gateway]:
    """A gateway with it as `hello`, and small limits."""
    fleet = TestFleet()
    fleet.deploy("hello", function.port, Scale())
    settings = Settings(
        gateway_head_bytes=16_384,
        gateway_body_bytes=100_000,
        gateway_header_timeout_s=0.3,
        gateway_keep_alive_s=0.5,
        gateway_connections=20,
    )
    async with listening(fleet, settings) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[Client]:
    """A client of the gateway."""
    async with connected(gateway) as client:
        yield client


def post(*lines: bytes, body: bytes = b"") -> bytes:
    """A POST with these header lines."""
    return b"\r\n".join((b"POST /f/hello/ HTTP/1.1", b"Host: x", *lines, b"", body))


CL, TE = b"Content-Length: 4", b"Transfer-Encoding: chunked"
END = b"0\r\n\r\n"

REFUSED = {
    "CL and TE": (post(CL, TE, body=END + SMUGGLED), 400),
    "TE and CL": (post(TE, CL, body=END + SMUGGLED), 400),
    "two CLs that differ": (post(CL, b"Content-Length: 50", body=b"abcd" + SMUGGLED), 400),
    "two CLs that agree": (post(CL, CL, body=b"abcd" + SMUGGLED), 400),
    "list of CLs": (post(b"Content-Length: 4, 4", body=b"abcd"), 400),
    "CL with a sign": (post(b"Content-Length: +4", body=b"abcd"), 400),
    "negative CL": (post(b"Content-Length: -1"), 400),
    "hexadecimal CL": (post(b"Content-Length: 0x4", body=b"abcd"), 400),
    "empty CL": (post(b"Content-Length: ", body=SMUGGLED), 400),
    "CL with a space in it": (post(b"Content-Length: 4 5", body=b"abcd"), 400),
    "CL beyond 64 bits": (post(b"Content-Length: 99999999999999999999"), 400),
    "CL beyond the limit": (post(b"Content-Length: 100001"), 413),
    "folded field": (post(b"X: y\r\n z", CL, body=b"abcd"), 400),
    "folded TE": (post(b"Transfer-Encoding:\r\n chunked", body=END), 400),
    "bare LF in the head": (b"GET /f/hello/ HTTP/1.1\nHost: x\n\n", 400),
    "bare LF behind a field": (post(b"X: y\nZ: a", CL, body=b"abcd"), 400),
    "bare CR in a field": (post(b"X: y\rZ: a", CL, body=b"abcd"), 400),
    "space before a colon": (post(b"Transfer-Encoding : chunked", body=END), 400),
    "TE identity": (post(b"Transfer-Encoding: identity", body=SMUGGLED), 501),
    "TE chunked, identity": (post(b"Transfer-Encoding: chunked, identity", body=END), 400),
    "TE gzip, chunked": (post(b"Transfer-Encoding: gzip, chunked", body=END), 501),
    "TE xchunked": (post(b"Transfer-Encoding: xchunked", body=END), 501),
    "TE with a vertical tab": (post(b"Transfer-Encoding: \x0bchunked", body=END), 400),
    "TE twice": (post(TE, b"Transfer-Encoding: identity", body=END), 400),
    "TE chunked twice": (post(TE, TE, body=END), 400),
    "TE in HTTP/1.0": (post(TE, body=END).replace(b"1.1", b"1.0"), 400),
    "chunk with a sign": (post(TE, body=b"-4\r\nabcd\r\n0\r\n\r\n"), 400),
    "chunk with 0x": (post(TE, body=b"0x4\r\nabcd\r\n0\r\n\r\n"), 400),
    "chunk beyond 64 bits": (post(TE, body=b"fffffffffffffffff\r\nabcd\r\n"), 400),
    "chunk that is longer than said": (post(TE, body=b"4\r\nabcdXX0\r\n\r\n"), 400),
    "chunk with a bare LF": (post(TE, body=b"4\nabcd\n0\n\n"), 400),
    "chunk extension with a bare LF": (post(TE, body=b"4;a\nabcd\r\n0\r\n\r\n"), 400),
    "trailer CL": (post(TE, body=b"0\r\nContent-Length: 4\r\n\r\n"), 400),
    "NUL in a field": (post(b"X: a\0b", CL, body=b"abcd"), 400),
    "field without a name": (post(b": a"), 400),
    "field without a colon": (post(b"Xabc"), 400),
    "field name with a bracket": (post(b"X(): a"), 400),
    "space before the first field": (b"GET /f/hello/ HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "no Host": (b"GET /f/hello/ HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (post(b"Host: y"), 400),
    "empty Host": (b"GET /f/hello/ HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "Host with a path": (b"GET /f/hello/ HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
    "Host with credentials": (b"GET /f/hello/ HTTP/1.1\r\nHost: u@x\r\n\r\n", 400),
    "Host with a bad port": (b"GET /f/hello/ HTTP/1.1\r\nHost: x:99999999\r\n\r\n", 400),
    "Host with two names": (b"GET /f/hello/ HTTP/1.1\r\nHost: x, y\r\n\r\n", 400),
    "Host of high bytes": (b"GET /f/hello/ HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /f/hello/\r\n\r\n", 505),
    "HTTP/1.2": (b"GET /f/hello/ HTTP/1.2\r\nHost: x\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", 405),
    "unknown method": (b"STEAL /f/hello/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "space in the target": (b"GET /f/hello/ a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "high bytes in the target": (b"GET /f/hello/\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
    "field of 1 MB": (post(b"X: " + b"a" * 1_000_000), 431),
    "target of 1 MB": (b"GET /f/hello/" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "300 fields": (post(*(b"X-%d: y" % number for number in range(300))), 431),
    "trailers of 1 MB": (post(TE, body=b"0\r\nX: " + b"a" * 1_000_000), 431),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_no_request_is_refused(client: Client, function: Function, name: str) -> None:
    """It is answered with its status, the connection ends, and no second request is made of it.

    A function that has seen the beginning of such a body sees no end of it.
    """
    data, expected = REFUSED[name]
    client.send(data)
    status, fields, _ = await client.answer()
    assert (status, fields["connection"]) == (expected, "close")
    assert fields["content-type"] == "application/problem+json"
    assert await client.ended()
    assert not any(b"smuggled" in head for head in function.heads)
    assert function.bodies == []


TAKEN = {
    "chunk extensions": post(TE, body=b"4;a=b;c\r\nabcd\r\n0;d\r\n\r\n"),
    "upper case chunked": post(b"TRANSFER-ENCODING: Chunked", body=b"4\r\nabcd\r\n0\r\n\r\n"),
    "CL with spaces round it": post(b"Content-Length:  4 ", body=b"abcd"),
    "empty lines before": b"\r\n\r\n" + post(CL, body=b"abcd"),
    "CL of a GET": post(CL, body=b"abcd").replace(b"POST", b"GET"),
    "hop-by-hop CL": post(b"Connection: Content-Length", CL, body=b"abcd"),
    "hop-by-hop TE": post(b"Connection: Transfer-Encoding", TE, body=b"4\r\nabcd\r\n0\r\n\r\n"),
    "absolute target": post(CL, body=b"abcd").replace(b"/f/hello/", b"http://hello.localhost/", 1),
}


@pytest.mark.parametrize("name", TAKEN)
async def test_unusual_requests_are_one_request(
    client: Client, function: Function, name: str
) -> None:
    """They reach the function as one plain request, and so does the one behind."""
    client.send(TAKEN[name] + GET)
    assert (await client.answer())[2] == b"1"
    assert (await client.answer())[2] == b"2"
    assert function.bodies == [b"abcd", b""]


async def test_good_requests_before_a_bad_one_are_answered(
    client: Client, function: Function
) -> None:
    """In order; then the refusal, then the end."""
    client.send(GET + GET + b"nonsense\r\n\r\n" + GET)
    assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 400]
    assert await client.ended()
    assert len(function.heads) == 2


async def test_chunked_body_beyond_the_limit(client: Client, function: Function) -> None:
    """413 as soon as it is too long, and the function gets no end of it."""
    client.send(post(TE, body=b""))
    for _ in range(11):
        client.send(b"%x\r\n" % 10_000 + bytes(10_000) + b"\r\n")
    assert (await client.answer())[0] == 413
    assert await client.ended()
    assert function.bodies == []


async def test_slow_heads(gateway: Gateway) -> None:
    """A head that does not arrive in time is 408; a silent client is let go without a word."""
    async with connected(gateway) as slow, connected(gateway) as silent:
        slow.send(GET[:-2])
        assert (await slow.answer())[0] == 408
        assert (await silent.answer())[0] == 0
    async with connected(gateway) as kept:
        kept.send(GET)
        assert (await kept.answer())[0] == 200
        assert (await kept.answer())[0] == 0


async def test_slow_heads_hold_nobody_up(gateway: Gateway) -> None:
    """Others are answered while many heads are on their way; one connection too many is 503."""
    clients = [connected(gateway) for _ in range(20)]
    opened = [await context.__aenter__() for context in clients]
    for client in opened[1:]:
        client.send(b"GET / HTTP/1.1\r\nX")
    opened[0].send(GET)
    assert (await opened[0].answer())[0] == 200
    async with connected(gateway) as another:
        assert (await another.answer())[0] == 503
    for context in clients:
        await context.__aexit__(None, None, None)
    await wait_for(lambda: not gateway.connections)


async def test_nothing_is_left_of_clients_that_send_garbage(gateway: Gateway) -> None:
    """All sorts of cut-off input at once: every connection ends and its memory goes."""

    async def throw(data: bytes) -> None:
        async with connected(gateway) as client:
            client.send(data)
            client.writer.write_eof()
            assert await client.ended()

    for data, _ in list(REFUSED.values())[:20]:
        await asyncio.gather(*(throw(data[:length]) for length in range(5, len(data), 40)))
    await wait_for(lambda: not gateway.connections)
