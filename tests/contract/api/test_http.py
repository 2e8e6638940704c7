"""The API as HTTP: the token, malformed requests, idempotency keys, OpenAPI, metrics."""

from __future__ import annotations

import contextlib
import re
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from torpor import Client
from torpor.errors import NotAllowed

from .conftest import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fixtures.daemons import DaemonProcess


pytestmark = pytest.mark.slow


@pytest.fixture
def local(lasting: DaemonProcess) -> Iterator[httpx.Client]:
    """HTTP over the daemon's socket."""
    transport = httpx.HTTPTransport(uds=str(lasting.socket))
    with httpx.Client(transport=transport, base_url="http://torpor", timeout=30) as http:
        yield http


@pytest.fixture
def remote(lasting: DaemonProcess) -> Iterator[httpx.Client]:
    """HTTP over TCP, without a token."""
    host, port = lasting.tcp_address()
    with httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as http:
        yield http


@contextlib.contextmanager
def raw_connection(served: DaemonProcess) -> Iterator[socket.socket]:
    """A connection to the daemon's socket, for what no library sends."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(30)
        raw.connect(str(served.socket))
        yield raw


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The problem that an answer must be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = dict(answer.json())
    assert said["status"] == status
    assert said["type"] == f"urn:torpor:error:{kind}"
    assert said["title"]
    assert said["detail"]
    return said


@pytest.mark.parametrize(
    "shown",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer  {TOKEN}",
        TOKEN,
    ],
)
@pytest.mark.parametrize("path", ["/v1/functions", "/metrics", "/v1/openapi.json", "/nothing"])
def test_tcp_refuses_without_the_token(remote: httpx.Client, shown: str | None, path: str) -> None:
    """Every path, whatever is shown but the token itself."""
    headers = {} if shown is None else {"Authorization": shown}
    answer = remote.get(path, headers=headers)
    problem(answer, 401, "NotAllowed")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_tcp_with_the_token(lasting: DaemonProcess, tmp_path: Any) -> None:  # noqa: ANN401
    """All but what reads a directory of the host."""
    host, port = lasting.tcp_address()
    with Client(f"http://{host}:{port}", token=TOKEN) as client:
        assert len(client.functions()) == 2
        with pytest.raises(NotAllowed, match="own socket only"):
            client.deploy(tmp_path)


def test_socket_is_the_owners_alone(lasting: DaemonProcess) -> None:
    """Who may open it needs no token, so nobody else may."""
    assert lasting.socket.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/functions/%2e%2e", None, 400),
        ("GET", "/v1/snapshots/..%2f..%2fetc%2fpasswd", None, 404),
        ("GET", "/v1/snapshots/.staging", None, 400),
        ("DELETE", "/v1/snapshots/%00", None, 400),
        ("DELETE", "/v1/functions/%ff", None, 400),
        ("GET", f"/v1/instances/{'x' * 4000}", None, 400),
        ("GET", "/v1/instances/x/logs?lines=0", None, 400),
        ("GET", "/v1/instances/x/logs?lines=x", None, 400),
        ("GET", "/v1/events?after=-1", None, 400),
        ("POST", "/v1/functions", {"directory": "../x"}, 400),
        ("POST", "/v1/functions", {"directory": "/\x00"}, 400),
        ("POST", "/v1/functions", {"directory": "/nowhere", "name": "../x"}, 400),
        ("POST", "/v1/functions", {"directory": "/nowhere", "name": "x/y"}, 400),
        ("POST", "/v1/functions", {"directory": "/nowhere", "more": 1}, 400),
        ("POST", "/v1/functions", [], 400),
        ("POST", "/v1/instances", {"reference": "../f"}, 400),
        ("POST", "/v1/instances", {"reference": "f", "expect": "x"}, 400),
        ("POST", "/v1/instances/x/fork", {"count": 0}, 400),
        ("POST", "/v1/instances/x/fork", {"count": "1"}, 400),
        ("POST", "/v1/instances/x/snapshots", {"name": "a/b"}, 400),
        ("POST", "/v1/instances/stop", {"ids": []}, 400),
        ("POST", "/v1/functions/f/invoke", {"path": "x"}, 400),
        ("POST", "/v1/functions/f/invoke", {"path": "/ HTTP/1.1\r\nX: y"}, 400),
        ("POST", "/v1/functions/f/invoke", {"body": "***"}, 400),
        ("POST", "/v1/functions/f/invoke", {"method": "GET /"}, 400),
        ("PUT", "/v1/functions", {}, 405),
        ("GET", "/v2/functions", None, 404),
    ],
)
def test_malformed_requests(
    local: httpx.Client, method: str, path: str, body: object, status: int
) -> None:
    """Each is a problem that says what is wrong, and nothing is done."""
    answer = local.request(method, path, json=body)
    kind = "NotFound" if status == 404 else "InvalidInput"
    problem(answer, status, kind)


def test_requests_out_of_size(lasting: DaemonProcess, local: httpx.Client) -> None:
    """A body by its length, a body without one, one that is cut off, a head that does not end."""
    with raw_connection(lasting) as raw:
        raw.sendall(
            b"POST /v1/functions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413 ")

    def pieces() -> Iterator[bytes]:
        for _ in range(65):
            yield b" " * (1 << 20)

    answer = local.post(
        "/v1/functions", headers={"Content-Type": "application/json"}, content=pieces()
    )
    problem(answer, 400, "InvalidInput")
    with raw_connection(
        lasting
    ) as raw:  # ended within its body: nothing is done, nobody is answered
        raw.sendall(b"POST /v1/functions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        raw.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 2" not in raw.recv(4096)
    with raw_connection(lasting) as raw:
        raw.sendall(b"GET /v1/functions HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                raw.sendall(b"X-More: " + b"y" * 8000 + b"\r\n")
        answer = raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request")
        assert b"content-type: application/problem+json" in answer
        assert b'"type":"urn:torpor:error:InvalidInput"' in answer
    assert local.get("/v1/functions").status_code == 200


def test_slow_heads(lasting: DaemonProcess, local: httpx.Client) -> None:
    """A request's head that does not arrive in time ends its connection, on both listeners."""
    with (
        raw_connection(lasting) as again,
        socket.create_connection(lasting.tcp_address(), timeout=30) as slow,
    ):
        slow.sendall(b"GET /v1/status HTTP/1.1\r\nHost")
        again.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\nGET /v1")
        assert again.recv(100).startswith(b"HTTP/1.1 200 ")
        assert slow.recv(100) == b""
        while again.recv(4096):
            pass
    assert local.get("/v1/status").status_code == 200


def test_failures_may_be_tried_again(local: httpx.Client) -> None:
    """What failed under an idempotency key is done anew; a malformed key is refused."""
    headers = {"Idempotency-Key": "one"}
    for _ in range(2):
        problem(local.post("/v1/instances/x/fork", json={}, headers=headers), 404, "NotFound")
    bad = local.post("/v1/instances/x/fork", json={}, headers={"Idempotency-Key": "a b"})
    problem(bad, 400, "InvalidInput")


def test_openapi(local: httpx.Client) -> None:
    """3.1, every reference in it leads somewhere, every operation may answer with a problem."""
    document = local.get("/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    names = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert names <= document["components"]["schemas"].keys()
    assert {"FunctionView", "Problem", "ForkedView"} <= names
    operations = [op for path in document["paths"].values() for op in path.values()]
    assert len({op["operationId"] for op in operations}) == len(operations) >= 20
    assert all("default" in op["responses"] for op in operations)


def test_metrics(local: httpx.Client) -> None:
    """What Prometheus reads: pool levels, uploads, the store, the gateway."""
    answer = local.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for name in (
        "torpor_cold_start_seconds",
        "torpor_instances",
        'torpor_slots{state="free"}',
        'torpor_uploads{state="pending"}',
        "torpor_store_errors_total",
        "torpor_store_bytes_total",
        "torpor_pager_up",
        "torpor_gateway_connections",
        "torpor_gateway_queued",
        "torpor_gateway_wakes_total",
    ):
        assert name in answer.text, name


def test_drain_closes_streams(served: DaemonProcess) -> None:
    """Who listens to events holds no drain up, and the socket goes."""
    transport = httpx.HTTPTransport(uds=str(served.socket))
    with (
        httpx.Client(transport=transport, base_url="http://torpor") as http,
        http.stream("GET", "/v1/events") as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert served.stop() == 0
    assert not served.socket.exists()
