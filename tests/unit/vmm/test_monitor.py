"""QMP sessions with a QEMU that does what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from torpor.errors import VmmFailed
from torpor.vmm.qemu.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {}}, "capabilities": []}}


async def read_object(reader: asyncio.StreamReader) -> bytes:
    """One JSON object without braces in its texts: a client ends none with a new line."""
    text = await reader.readuntil(b"}")
    while text.count(b"{") > text.count(b"}"):
        text += await reader.readuntil(b"}")
    return text


@contextlib.asynccontextmanager
async def session(path: Path, events: Sequence[str]) -> AsyncIterator[Monitor]:
    """A session with one that answers two commands, then sends a status for each event and ends."""

    async def be_qemu(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(message: object) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        say(GREETING)
        for _ in ("qmp_capabilities", "migrate-incoming"):
            request = json.loads(await read_object(reader))
            say({"return": {}} | {name: request[name] for name in ("id",) if name in request})
        for status in events:
            time = {"seconds": 1, "microseconds": 0}
            say({"event": "MIGRATION", "data": {"status": status}, "timestamp": time})
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(be_qemu, path):
        monitor = Monitor("test")
        await monitor.connect(path)
        try:
            yield monitor
        finally:
            await monitor.close()


async def test_end_in_place_of_an_event(tmp_path: Path) -> None:
    """Who waits for an event of a QEMU that ends is told at once that it ended."""
    async with session(tmp_path / "qmp", ["setup", "active"]) as monitor:
        with pytest.raises(VmmFailed, match="QEMU ended the session"):
            await monitor.execute_until(
                "migrate-incoming", {}, event="MIGRATION", statuses=("completed", "failed")
            )


async def test_event_comes(tmp_path: Path) -> None:
    """The first status that is waited for is returned, others are not."""
    async with session(tmp_path / "qmp", ["setup", "completed"]) as monitor:
        status = await monitor.execute_until(
            "migrate-incoming", {}, event="MIGRATION", statuses=("completed", "failed")
        )
    assert status == "completed"
