"""What Firecracker 1.16.1 answered, replayed: to the protocol fake, and to our decoder.

The record was made with the real program: its sessions are lists of requests with their answers. A
request whose body is text is sent as it is.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.firecracker import make_fake
from torpor.errors import VmmFailed
from torpor.vmm.firecracker.api import Head, decode_answer, decode_head
from torpor.vmm.firecracker.program import Version
from torpor.vmm.firecracker.requests import (
    SAVED_MEMORY,
    SAVED_STATE,
    Request,
    load_request,
    run_request,
    save_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORD = json.loads(Path(__file__).with_name("recorded-1.16.1.json").read_text())
_COLUMN = re.compile(r" at line 1 column \d+")


def exchange(path: Path, method: str, target: str, body: Any) -> tuple[int, Any]:  # noqa: ANN401
    """Send one request as the record has it; status and JSON of the answer."""
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answer:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(head.encode() + b"\r\n" + (b"" if body is None else data))
        lines = b""
        while not lines.endswith(b"\r\n\r\n"):
            lines += answer.readline()
        decoded = decode_head(lines)
        content = answer.read(decoded.length)
    return decoded.status, json.loads(content) if content else None


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The fake at a socket, with the files of a VM around it."""
    program = make_fake(directory)
    for name in ("image", "scratch", "app", "initramfs"):
        (directory / name).touch()
    (directory / "vmlinux").write_bytes(b"\x7fELF")
    child = subprocess.Popen([program, "--api-sock", "api.sock"], cwd=directory)
    try:
        while not (directory / "api.sock").exists() or not _listens(directory / "api.sock"):
            assert child.poll() is None
            time.sleep(0.005)
        yield child, directory / "api.sock"
    finally:
        child.kill()
        child.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def save_a_vm(directory: Path) -> None:
    """Device state and memory of a VM, made by the fake itself."""
    (directory / "first").mkdir()
    with serving(directory / "first") as (_, path):
        for entry in RECORD["boot"]["exchanges"]:
            exchange(path, *entry["request"])
    for old, new in (("vmstate.new", "vmstate"), ("memory.new", "memory")):
        (directory / "first" / old).rename(directory / new)


def _flip(directory: Path) -> None:
    save_a_vm(directory)
    state = bytearray((directory / "vmstate").read_bytes())
    state[len(state) // 2] ^= 1
    (directory / "vmstate").write_bytes(state)


def _shorten(directory: Path) -> None:
    save_a_vm(directory)
    (directory / "memory").write_bytes(b"x" * 4096)


def _lose_memory(directory: Path) -> None:
    save_a_vm(directory)
    (directory / "memory").unlink()


PREPARED: dict[str, Callable[[Path], object]] = {
    "load": save_a_vm,
    "load flipped": _flip,
    "load short memory": _shorten,
    "load no memory": _lose_memory,
    "load no drive": save_a_vm,
    "load garbage": lambda directory: (directory / "vmstate").write_bytes(b"garbage" * 999),
    "load empty": lambda directory: (directory / "vmstate").touch(),
}


@pytest.mark.parametrize("session", RECORD)
def test_fake_answers_as_recorded(session: str, tmp_path: Path) -> None:
    """Every status and every word, but for the column of a JSON error; and whether it ends."""
    PREPARED.get(session, lambda _: None)(tmp_path)
    with serving(tmp_path) as (child, path):
        if session == "load no drive":
            (tmp_path / "scratch").unlink()
        if session == "wrong kernel":
            (tmp_path / "vmlinux").write_bytes(b"MZ and so on")
        for entry in RECORD[session]["exchanges"]:
            status, content = exchange(path, *entry["request"])
            got = _COLUMN.sub("", json.dumps([status, content]))
            assert got == _COLUMN.sub("", json.dumps(entry["answer"])), entry["request"]
        if RECORD[session]["ends"]:
            assert child.wait(timeout=20) == 1
        else:
            assert child.poll() is None


def test_recorded_refusals_come_through_in_their_own_words() -> None:
    """Each answer of the record is what the driver's caller gets to read."""
    count = 0
    for session in RECORD.values():
        for entry in session["exchanges"]:
            (method, path, _), (status, content) = entry["request"], entry["answer"]
            body = b"" if content is None else json.dumps(content).encode()
            request, head = Request(method, path), Head(status, len(body))
            if status < 300:
                assert decode_answer(request, head, body) == content
                continue
            with pytest.raises(VmmFailed, match=f"^Firecracker refused {method} {path}: ") as error:
                decode_answer(request, head, body)
            assert error.value.reason == content["fault_message"]
            count += 1
    assert count > 30


def test_what_the_driver_sends_was_accepted() -> None:
    """The very bodies that the driver makes are in the record, with status 204."""
    accepted = [
        entry["request"]
        for session in RECORD.values()
        for entry in session["exchanges"]
        if entry["answer"][0] == 204
    ]
    for request in (
        load_request(Version(1, 16, 1)),
        save_request(whole=False),
        run_request(paused=True),
        run_request(paused=False),
    ):
        assert [request.method, request.path, as_recorded(request.body)] in accepted


def as_recorded(body: dict[str, Any] | None) -> dict[str, Any] | None:
    """The body with the names that the files had when the answers were recorded."""
    names = {SAVED_STATE: "vmstate.new", SAVED_MEMORY: "memory.new"}
    return body and {
        key: names.get(value, value) if isinstance(value, str) else value
        for key, value in body.items()
    }
