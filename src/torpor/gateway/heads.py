"""Heads of requests and responses as they are passed on. Pure: no IO.

What is read comes from a strict parser (llhttp); what is sent is written anew from what was
understood, with a framing of our own: whatever a function makes of it, it sees the same number of
requests as we did. Hop-by-hop fields are RFC 9110, section 7.6.1.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import httptools

from torpor.errors import NotFound
from torpor.gateway.problems import Refused, malformed
from torpor.units import is_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Header = tuple[bytes, bytes]
Framing = Literal["none", "length", "chunked", "close"]

_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection proxy-authorization te trailer transfer-encoding"
    b" upgrade content-length".split()
)
_OURS: Final = frozenset(
    b"host x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-prefix x-request-id"
    b" traceparent tracestate".split()
)
_HOST: Final = re.compile(rb"([A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{0,5})?")
_PATH: Final = re.compile(rb"/f/([^/?]+)(.*)", re.DOTALL)
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
_TRACEPARENT: Final = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


@dataclass
class RequestHead:
    """A request without its body, as the client sent it. `version` is 1.0 or 1.1."""

    method: bytes
    target: bytes
    version: str
    headers: list[Header]
    keep_alive: bool
    upgrade: bool = False
    request_id: bytes = b""
    _index: dict[bytes, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._index = {name.lower(): value for name, value in reversed(self.headers)}
        given = self._index.get(b"x-request-id", b"")
        valid = _REQUEST_ID.fullmatch(given) is not None
        self.request_id = given if valid else secrets.token_hex(16).encode()

    def get(self, name: bytes) -> bytes | None:
        """The first field of that name, which is given in lower case."""
        return self._index.get(name)

    @property
    def websocket(self) -> bool:
        """Whether the client wants this connection to become a WebSocket."""
        return self.upgrade and (self.get(b"upgrade") or b"").strip().lower() == b"websocket"

    @property
    def framing(self) -> Framing:
        """How the body is delimited."""
        if b"transfer-encoding" in self._index:
            return "chunked"
        return "length" if b"content-length" in self._index else "none"


@dataclass(frozen=True)
class Route:
    """Where a request goes: the function, and host, target and prefix as it is to see them."""

    function: str
    host: bytes
    target: bytes
    prefix: bytes = b""


@dataclass(frozen=True)
class ResponseHead:
    """A response without its body, as the function sent it."""

    status: int
    reason: bytes
    headers: Sequence[Header]
    framing: Framing
    keep_alive: bool


def check_request(head: RequestHead) -> None:
    """Raise Refused for what is not passed on although it could be parsed."""
    if head.version not in ("1.0", "1.1"):
        raise Refused(505, "version-not-supported", "this gateway speaks HTTP/1.0 and HTTP/1.1")
    if head.method == b"CONNECT":
        raise Refused(405, "method-not-allowed", "this gateway is no tunnel: CONNECT is refused")
    codings = [value for name, value in head.headers if name.lower() == b"transfer-encoding"]
    coding = b",".join(codings) if codings else None
    if coding is not None and head.version == "1.0":
        raise malformed("HTTP/1.0 has no Transfer-Encoding")
    if coding is not None and coding.strip().lower() != b"chunked":
        raise Refused(501, "not-implemented", "the only Transfer-Encoding is chunked")
    hosts = sum(1 for name, _ in head.headers if name.lower() == b"host")
    if hosts > 1:
        raise malformed("a request has one Host")
    if hosts == 0 and head.version == "1.1":
        raise malformed("an HTTP/1.1 request has a Host")
    if hosts and _HOST.fullmatch(head.get(b"host") or b"") is None:
        raise malformed("the Host is not a host name with an optional port")


def find_route(head: RequestHead, domain: str) -> Route:
    """The function that a request means: `<function>.<domain>` as host, else `/f/<function>/…`.

    Raises Refused, NotFound when it means none.
    """
    host, target = head.get(b"host") or b"", head.target
    if not target.startswith(b"/") and target != b"*":
        host, target = _split_absolute(target)
    name = _function_of_host(host, domain)
    if name is not None:
        return Route(_checked(name), host, target)
    found = _PATH.fullmatch(target)
    if found is None:
        raise NotFound(
            f"no function is named by this request: the host is not <function>.{domain},"
            " and the path is not /f/<function>/"
        )
    rest = found[2] if found[2].startswith(b"/") else b"/" + found[2]
    return Route(_checked(found[1].decode("latin-1")), host, rest, b"/f/" + found[1])


def encode_request(
    head: RequestHead, route: Route, *, client: str, traceparent: bytes | None = None
) -> bytes:
    """The head that the function gets; `client` is the address that asked.

    With `traceparent` the gateway has a span of its own in the client's trace.
    """
    lines = [b"%b %b HTTP/1.1\r\nHost: %b" % (head.method, route.target, route.host)]
    lines += _end_to_end(head.headers, _OURS)
    get = head.get
    before = get(b"x-forwarded-for")
    ours = client.encode()
    lines.append(b"X-Forwarded-For: " + (b"%b, %b" % (before, ours) if before else ours))
    lines.append(b"X-Forwarded-Proto: " + (get(b"x-forwarded-proto") or b"http"))
    lines.append(b"X-Forwarded-Host: " + (get(b"x-forwarded-host") or route.host))
    if route.prefix:
        lines.append(b"X-Forwarded-Prefix: " + route.prefix)
    lines.append(b"X-Request-Id: " + head.request_id)
    lines += _trace_context(head, traceparent)
    match head.framing:
        case "length":
            lines.append(b"Content-Length: " + (get(b"content-length") or b"0").strip())
        case "chunked":
            lines.append(b"Transfer-Encoding: chunked")
    if head.websocket:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def encode_response(
    head: ResponseHead, *, framing: Framing, keep_alive: bool, request_id: bytes
) -> bytes:
    """The head that the client gets, with the framing that its version understands."""
    lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    lines += _end_to_end(head.headers, frozenset((b"x-request-id",)))
    lines.append(b"X-Request-Id: " + request_id)
    if head.status == 101:
        lines.append(b"Connection: Upgrade\r\nUpgrade: websocket")
        return b"\r\n".join(lines) + b"\r\n\r\n"
    if framing == "length":
        lines.append(b"Content-Length: " + _length_of(head.headers))
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
    lines.append(b"Connection: keep-alive" if keep_alive else b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def encode_interim(head: ResponseHead) -> bytes:
    """A 1xx response as it is passed on."""
    lines = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    return b"\r\n".join(lines + _end_to_end(head.headers, frozenset())) + b"\r\n\r\n"


def read_response(
    status: int, reason: bytes, headers: Sequence[Header], *, version: str, method: bytes
) -> ResponseHead:
    """A function's response; its framing as RFC 9112, section 6.3, has it."""
    names = {name.lower(): value for name, value in headers}
    framing: Framing = "close"
    if method == b"HEAD" or status in (204, 304) or status < 200:
        # a length then tells what a GET would have had
        framing = "length" if b"content-length" in names and status != 204 else "none"
    elif b"transfer-encoding" in names:
        framing = "chunked"
    elif b"content-length" in names:
        framing = "length"
    tokens = _tokens(headers)
    keep_alive = version == "1.1" and b"close" not in tokens and framing != "close"
    return ResponseHead(status, reason, headers, framing, keep_alive)


def _end_to_end(headers: Iterable[Header], without: frozenset[bytes]) -> list[bytes]:
    named = _tokens(headers)
    return [
        b"%b: %b" % (name, value)
        for name, value in headers
        if (low := name.lower()) not in _HOP and low not in without and low not in named
    ]


def _tokens(headers: Iterable[Header]) -> set[bytes]:
    """What the Connection fields list."""
    found: set[bytes] = set()
    for name, value in headers:
        if len(name) == 10 and name.lower() == b"connection":
            found.update(token.strip().lower() for token in value.split(b","))
    return found


def _length_of(headers: Iterable[Header]) -> bytes:
    return next(value.strip() for name, value in headers if name.lower() == b"content-length")


def _trace_context(head: RequestHead, ours: bytes | None) -> list[bytes]:
    given = head.get(b"traceparent")
    if given is not None and _TRACEPARENT.fullmatch(given):
        state = head.get(b"tracestate")
        kept = [b"traceparent: " + (ours or given)]
        return kept + ([b"tracestate: " + state] if state else [])
    if ours is not None:
        return [b"traceparent: " + ours]
    made = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
    return [b"traceparent: " + made.encode()]


def _split_absolute(target: bytes) -> tuple[bytes, bytes]:
    """Host and path of an absolute request target, which RFC 9112 puts before the Host field."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        raise malformed("the request target is no URL") from None
    if url.schema is None or url.schema.lower() not in (b"http", b"https") or not url.host:
        raise malformed("the request target is neither a path nor an http URL")
    if url.userinfo:
        raise malformed("the request target has user information in it")
    host = url.host if url.port is None else b"%b:%d" % (url.host, url.port)
    path = url.path or b"/"
    return host, path if url.query is None else b"%b?%b" % (path, url.query)


def _function_of_host(host: bytes, domain: str) -> str | None:
    if host.startswith(b"["):
        return None
    name = host.split(b":")[0].decode("latin-1").lower().rstrip(".")
    ending = f".{domain.lower()}"
    return name.removesuffix(ending) if domain and name.endswith(ending) else None


def _checked(name: str) -> str:
    if not is_name(name):
        raise NotFound(f"there is no function {name[:80]!r}: that is not a function's name")
    return name
