"""What Firecracker 1.16.1 answered, replayed: to the protocol fake, and to our decoder."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from fixtures.firecracker import make_fake
from fixtures.recorded import RECORD, exchange, listens, words_of
from torpor.errors import VmmFailed
from torpor.vmm.firecracker.api import Head, decode_answer
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
    from pathlib import Path


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The fake at a socket, with the files of a VM around it."""
    program = make_fake(directory)
    for name in ("image", "scratch", "app", "initramfs"):
        (directory / name).touch()
    (directory / "vmlinux").write_bytes(b"\x7fELF")
    child = subprocess.Popen([program, "--api-sock", "api.sock"], cwd=directory)
    try:
        while not (directory / "api.sock").exists() or not listens(directory / "api.sock"):
            assert child.poll() is None
            time.sleep(0.005)
        yield child, directory / "api.sock"
    finally:
        child.kill()
        child.wait()


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
            assert words_of([status, content]) == words_of(entry["answer"]), entry["request"]
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
