"""Heads as they are passed on: routing, hop-by-hop fields, forwarding, trace context."""

from __future__ import annotations

import re

import pytest

from torpor.errors import NotFound
from torpor.gateway.heads import (
    RequestHead,
    encode_request,
    encode_response,
    find_route,
    read_response,
)
from torpor.gateway.problems import Refused


def request(
    target: bytes = b"/", *headers: tuple[bytes, bytes], host: bytes = b"hello.localhost"
) -> RequestHead:
    """A request's head."""
    return RequestHead(b"GET", target, "1.1", [(b"Host", host), *headers], True)


@pytest.mark.parametrize(
    ("host", "target", "function", "passed", "prefix"),
    [
        (b"hello.localhost", b"/a?b", "hello", b"/a?b", b""),
        (b"HELLO.LocalHost:8080", b"/", "hello", b"/", b""),
        (b"hello.localhost.", b"/", "hello", b"/", b""),
        (b"a.b.localhost", b"/", "a.b", b"/", b""),
        (b"hello.localhost", b"/f/other/", "hello", b"/f/other/", b""),
        (b"10.0.0.1:80", b"/f/hello/a/b?c=d", "hello", b"/a/b?c=d", b"/f/hello"),
        (b"x", b"/f/hello", "hello", b"/", b"/f/hello"),
        (b"x", b"/f/hello?x=1", "hello", b"/?x=1", b"/f/hello"),
        (b"[::1]:80", b"/f/hello//x", "hello", b"//x", b"/f/hello"),
        (b"x", b"http://hello.localhost/p?q", "hello", b"/p?q", b""),
        (b"hello.localhost", b"http://x:80/f/other/y", "other", b"/y", b"/f/other"),
        (b"hello.localhost", b"*", "hello", b"*", b""),
    ],
)
def test_routes(host: bytes, target: bytes, function: str, passed: bytes, prefix: bytes) -> None:
    """The host below the domain names the function, else the path, whose prefix is stripped."""
    route = find_route(request(target, host=host), "localhost")
    assert (route.function, route.target, route.prefix) == (function, passed, prefix)


@pytest.mark.parametrize(
    ("host", "target"),
    [
        (b"localhost", b"/"),
        (b"hello.example.org", b"/"),
        (b"x", b"/f/"),
        (b"x", b"/f//y"),
        (b"x", b"/g/hello/"),
        (b"x", b"/f/..%2fetc/"),
        (b"x", b"/f/../etc"),
        (b".localhost", b"/"),
        (b"_a.localhost", b"/"),
        (b"x", b"/f/" + b"a" * 64),
    ],
)
def test_what_names_no_function_is_said_so(host: bytes, target: bytes) -> None:
    """A request without a function, or with a name that none can have, is a NotFound."""
    with pytest.raises(NotFound, match="function"):
        find_route(request(target, host=host), "localhost")


@pytest.mark.parametrize("target", [b"ftp://a/b", b"http://u:p@a/b", b"hello.localhost:80", b"a"])
def test_targets_that_are_no_request_target(target: bytes) -> None:
    """Only paths, `*` and http URLs without credentials are taken."""
    with pytest.raises(Refused) as refused:
        find_route(request(target), "localhost")
    assert refused.value.problem.status == 400


def passed_on(head: RequestHead) -> list[bytes]:
    """The lines that the function gets."""
    encoded = encode_request(head, find_route(head, "localhost"), client="192.0.2.1")
    return encoded.removesuffix(b"\r\n\r\n").split(b"\r\n")


def test_hop_by_hop_fields_stay_here() -> None:
    """Neither the known ones are passed on nor those that Connection lists; ours cannot be."""
    lines = passed_on(
        request(
            b"/",
            (b"Connection", b"close, X-Hop, Host, x-request-id"),
            (b"X-Hop", b"1"),
            (b"Keep-Alive", b"5"),
            (b"TE", b"trailers"),
            (b"Trailer", b"X"),
            (b"Proxy-Connection", b"x"),
            (b"Proxy-Authorization", b"x"),
            (b"Upgrade", b"h2c"),
            (b"X-Kept", b"yes"),
            (b"Authorization", b"Bearer x"),
        )
    )
    names = [line.split(b":")[0].lower() for line in lines[1:]]
    assert names[:3] == [b"host", b"x-kept", b"authorization"]
    assert not {b"connection", b"x-hop", b"keep-alive", b"te", b"upgrade", b"trailer"} & set(names)
    assert b"x-request-id" in names
    assert len(names) == len(set(names))


def test_forwarded_fields() -> None:
    """The client's address is added; protocol and host are those of a proxy before us, if any."""
    lines = passed_on(request(b"/f/hello/x", host=b"outer:1"))
    assert b"X-Forwarded-For: 192.0.2.1" in lines
    assert b"X-Forwarded-Host: outer:1" in lines
    assert b"X-Forwarded-Proto: http" in lines
    assert b"X-Forwarded-Prefix: /f/hello" in lines
    lines = passed_on(
        request(b"/", (b"X-Forwarded-For", b"198.51.100.7"), (b"X-Forwarded-Proto", b"https"))
    )
    assert b"X-Forwarded-For: 198.51.100.7, 192.0.2.1" in lines
    assert b"X-Forwarded-Proto: https" in lines


GOOD_TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (GOOD_TRACE, True),
        (b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01", False),
        (GOOD_TRACE.upper(), False),
        (b"ff" + GOOD_TRACE[2:], False),
        (b"x", False),
    ],
)
def test_trace_context_is_kept_or_made(given: bytes, kept: bool) -> None:
    """A sound traceparent goes on with its tracestate; in place of another comes a new one."""
    lines = passed_on(request(b"/", (b"Traceparent", given), (b"Tracestate", b"a=b")))
    (trace,) = (line for line in lines if line.lower().startswith(b"traceparent: "))
    assert (trace == b"traceparent: " + given) is kept
    assert re.fullmatch(rb"traceparent: 00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", trace)
    assert (b"tracestate: a=b" in lines) is kept


@pytest.mark.parametrize(
    ("given", "kept"), [(b"abc-1", True), (b"a b", False), (b"x" * 129, False), (b"", False)]
)
def test_request_id_is_kept_or_made(given: bytes, kept: bool) -> None:
    """A printable id of up to 128 characters is kept, in place of another comes a new one."""
    head = request(b"/", (b"x-request-id", given))
    assert (head.request_id == given) is kept
    assert b"X-Request-Id: " + head.request_id in passed_on(head)


@pytest.mark.parametrize(
    ("status", "method", "fields", "framing"),
    [
        (200, b"GET", [(b"Content-Length", b"3")], "length"),
        (200, b"GET", [(b"Transfer-Encoding", b"chunked")], "chunked"),
        (200, b"GET", [], "close"),
        (200, b"HEAD", [(b"Content-Length", b"3")], "length"),
        (200, b"HEAD", [(b"Transfer-Encoding", b"chunked")], "none"),
        (204, b"GET", [(b"Content-Length", b"3")], "none"),
        (304, b"GET", [(b"Content-Length", b"3")], "length"),
    ],
)
def test_framing_of_responses(
    status: int, method: bytes, fields: list[tuple[bytes, bytes]], framing: str
) -> None:
    """As RFC 9112, section 6.3, has it."""
    head = read_response(status, b"", fields, version="1.1", method=method)
    assert head.framing == framing


def test_responses_get_our_framing_and_id() -> None:
    """A function's hop-by-hop fields and its own request id are not passed on."""
    fields = [
        (b"Connection", b"close"),
        (b"X-Request-Id", b"its own"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Set-Cookie", b"a"),
        (b"Set-Cookie", b"b"),
    ]
    head = read_response(200, b"OK", fields, version="1.1", method=b"GET")
    assert not head.keep_alive
    encoded = encode_response(head, framing="chunked", keep_alive=True, request_id=b"ours")
    assert encoded == (
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nX-Request-Id: ours\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"
    )
