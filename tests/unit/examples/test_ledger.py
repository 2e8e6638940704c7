"""The ledger as a program on this host: what it counts and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

LEDGER = Path(__file__).parents[3] / "examples" / "ledger" / "ledger.py"


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a running ledger."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    environ = {**os.environ, "LEDGER": str(tmp_path / "ledger.db"), "PORT": str(port)}
    command = [sys.executable, LEDGER]
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as child:
        try:
            wait_for(port, child)
            yield port
        finally:
            child.kill()


def wait_for(port: int, child: subprocess.Popen[bytes]) -> None:
    """Until it listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            assert child.poll() is None
            assert time.monotonic() < deadline
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.02)


def ask(port: int, body: bytes | None = None, length: str | None = None) -> tuple[int, Any]:
    """GET, or POST of a body, with a Content-Length of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("GET" if body is None else "POST", "/")
    if body is not None:
        connection.putheader("Content-Length", length or str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    status, value = answer.status, json.loads(answer.read())
    connection.close()
    return status, value


def test_rows_add_up(port: int) -> None:
    """Each row gets the next number; GET tells count, sum, last number and integrity."""
    for number, amount in enumerate((5, -7, 2**31), 1):
        row = json.dumps({"amount": amount, "note": "é"}).encode()
        assert ask(port, row) == (201, {"number": number})
    assert ask(port) == (
        200,
        {"count": 3, "sum": 2**31 - 2, "last": 3, "integrity": "ok"},
    )


@pytest.mark.parametrize(
    ("body", "length", "status"),
    [
        (b"", None, 400),
        (b"no JSON", None, 400),
        (b"\xff", None, 400),
        (b"[]", None, 400),
        (b"{}", None, 400),
        (b'{"amount": "5"}', None, 400),
        (b'{"amount": true}', None, 400),
        (b'{"amount": 1.5}', None, 400),
        (b'{"amount": 99999999999999999999}', None, 400),
        (b'{"amount": 1, "note": "\\ud800"}', None, 400),
        (b"{}", "-1", 413),
        (b"{}", "many", 413),
        (b"{}", "99999999", 413),
    ],
)
def test_what_is_no_row_is_refused(port: int, body: bytes, length: str | None, status: int) -> None:
    """Whatever is posted gets an answer with a reason, and nothing is added."""
    code, answer = ask(port, body, length)
    assert code == status
    assert answer["error"]
    assert ask(port)[1]["count"] == 0
