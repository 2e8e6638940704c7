"""Blocking work hears a cancellation at once, and no cancellation is lost."""

from __future__ import annotations

import ast
import asyncio
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import torpor
from torpor.host.cancel import Cancelled, checkpoint, entered_in_thread, in_thread, uncancelled
from torpor.host.lock import exclusive
from torpor.host.process import ProcessId
from torpor.node.invoke import Request, send_request
from torpor.vmm.interface import finish
from torpor.vmm.qemu.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def child() -> Iterator[ProcessId]:
    """A process that does not end by itself."""
    process = subprocess.Popen(["sleep", "1000"])
    try:
        yield ProcessId.of(process.pid)
    finally:
        process.kill()
        process.wait()


async def cancelled_soon(work: asyncio.Task[object]) -> None:
    """Cancel a task and see it end by that, long before anything it waits for."""
    await asyncio.sleep(0.05)
    work.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await work


async def test_waiting_for_a_process(child: ProcessId) -> None:
    """A command that waits for its VM's end is interrupted, and the VM is none the worse."""
    await cancelled_soon(asyncio.ensure_future(in_thread(child.wait, timeout_s=900)))
    assert child.is_alive()


async def test_waiting_for_an_answer() -> None:
    """A request to a function that never answers ends with its command."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        await cancelled_soon(
            asyncio.ensure_future(
                in_thread(send_request, "127.0.0.1", port, Request(), timeout_s=900)
            )
        )


async def test_waiting_for_a_lock(tmp_path: Path) -> None:
    """Who waits for a lock is interrupted, and holds nothing afterwards."""
    path = tmp_path / "lock"

    async def wait() -> None:
        async with entered_in_thread(exclusive(path, timeout_s=900, what="it")):
            raise AssertionError("somebody else has it")

    with exclusive(path, timeout_s=0, what="it"):
        await cancelled_soon(asyncio.ensure_future(wait()))
    with exclusive(path, timeout_s=0, what="it"):
        pass


async def test_lock_taken_as_the_cancellation_came(tmp_path: Path) -> None:
    """A lock that was taken at the very moment of the cancellation is given back."""
    path = tmp_path / "lock"
    context = exclusive(path, timeout_s=0, what="it")
    entering = context.__enter__
    task: asyncio.Task[None]

    class Entered:
        def __enter__(self) -> None:
            entering()
            loop.call_soon_threadsafe(task.cancel)

        def __exit__(self, *exception: object) -> None:
            context.__exit__(None, None, None)

    async def take() -> None:
        async with entered_in_thread(Entered()):  # type: ignore[arg-type]
            await asyncio.sleep(900)

    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(take())
    with pytest.raises(asyncio.CancelledError):
        await task
    with exclusive(path, timeout_s=0, what="it"):
        pass


async def test_cancellation_that_meets_an_answer() -> None:
    """A cancellation that comes together with QEMU's answer is not lost."""
    answer = asyncio.get_running_loop().create_future()
    monitor = Monitor("none")
    waiting = asyncio.ensure_future(monitor._within(answer, "nothing"))
    await asyncio.sleep(0)
    answer.set_result("done")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_nothing_uses_wait_for() -> None:
    """Python 3.11's asyncio.wait_for drops such a cancellation: no module calls it."""
    for path in Path(torpor.__file__).parent.rglob("*.py"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert "wait_for" not in names, path


async def test_clean_up_is_not_cut_off() -> None:
    """However often a command is interrupted, what it has to finish it finishes."""
    done = asyncio.Event()
    go_on = asyncio.Event()

    async def clean_up() -> None:
        await go_on.wait()
        done.set()

    cleaning = asyncio.ensure_future(finish(clean_up()))
    for _ in range(3):
        await asyncio.sleep(0)
        cleaning.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await cleaning
    assert done.is_set()


async def test_undoing_is_not_cut_off() -> None:
    """Work that was cancelled undoes what it did with calls that would stop at a checkpoint."""
    undone = []

    def work() -> None:
        try:
            while True:
                signal.sigtimedwait([], 0.01)
                checkpoint()
        except Cancelled:
            with uncancelled():
                checkpoint()
                undone.append(True)
            raise

    await cancelled_soon(asyncio.ensure_future(in_thread(work)))
    assert undone
