"""The real Firecracker beside what is known of 1.16.1; runs in level 1 only."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from fixtures.firecracker import needed_firecracker
from fixtures.nodes import ask, running
from fixtures.recorded import RECORD, exchange, listens, words_of
from torpor.config import Settings
from torpor.image.kernel import load_boot
from torpor.vmm.firecracker.program import Version, find_version
from torpor.vmm.firecracker.requests import NOT_OPENED

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.node.node import Node

ALONE = ("before boot", "load nothing", "load garbage", "load empty", "wrong kernel")
"""The recorded sessions that need nothing of a VM which ran before."""


def test_answers_are_those_that_were_recorded(tmp_path: Path) -> None:
    """What the protocol fake was proved against is what the real one answers, word for word."""
    program = needed_firecracker()
    if find_version(program) != Version(1, 16, 1):
        pytest.skip("the record is of 1.16.1")
    boot = load_boot(Settings().boot_dir)
    for session in ALONE:
        directory = tmp_path / session.replace(" ", "-")
        directory.mkdir()
        for name in ("image", "scratch", "app"):
            (directory / name).touch()
        (directory / "initramfs").symlink_to(boot.initramfs)
        if session == "wrong kernel":
            (directory / "vmlinux").write_bytes(b"MZ" + bytes(4096))
        else:
            (directory / "vmlinux").symlink_to(boot.vmlinux)
        match session:
            case "load garbage":
                (directory / "vmstate").write_bytes(b"garbage" * 999)
            case "load empty":
                (directory / "vmstate").touch()
        _compare(program, directory, session)


@pytest.mark.vm
async def test_device_state_alone(node: Node, tmp_path: Path) -> None:
    """It writes device state before it finds no place for memory, and its guest goes on."""
    async with running(node, "ledger") as instance:
        await instance.vmm.pause()
        await instance.vmm.save_state(tmp_path / "vmstate")
        await instance.vmm.resume()
        seen = await ask(instance)
        log = instance.vmm.config.vmm_log.read_text()
    assert seen["integrity"] == "ok"
    assert (tmp_path / "vmstate").stat().st_size > 0
    assert log.count(NOT_OPENED) == 1
    assert "diff snapshots" not in log


def _compare(program: str, directory: Path, session: str) -> None:
    child = subprocess.Popen(
        [program, "--api-sock", "api.sock"], cwd=directory, stdout=subprocess.DEVNULL
    )
    try:
        while not listens(directory / "api.sock"):
            assert child.poll() is None
            time.sleep(0.01)
        for entry in RECORD[session]["exchanges"]:
            answer = exchange(directory / "api.sock", *entry["request"])
            assert words_of([*answer]) == words_of(entry["answer"]), (session, entry["request"])
        if RECORD[session]["ends"]:
            assert child.wait(timeout=20) == 1
    finally:
        child.kill()
        child.wait()
