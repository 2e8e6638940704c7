"""A signal is heard whenever it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, os, signal
from torpor.cli.early import listen
from torpor.cli.context import run_async

listen()
os.kill(os.getpid(), signal.{early})

async def work() -> None:
    print("began", flush=True)
    try:
        await asyncio.sleep(30)
    finally:
        os.kill(os.getpid(), signal.{late})
        print("cleaned up", flush=True)

try:
    run_async(work)
finally:
    os.kill(os.getpid(), signal.{late})
    print("left", flush=True)
"""


@pytest.mark.parametrize(("early", "late"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_signal_before_and_after_the_work(early: str, late: str) -> None:
    """One before the work cancels it as it begins; those during and after its end change nothing"""
    program = PROGRAM.format(early=early, late=late) + "\n"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.split("\n") == ["began", "cleaned up", "left", ""]
    assert answer.stderr.startswith("interrupted; nothing was left behind")
    assert "KeyboardInterrupt" not in answer.stderr


DEAF = """
import asyncio, os, signal, threading, time
from torpor.cli.early import listen
from torpor.cli.context import run_async
from torpor.host.cancel import checkpoint, in_thread

def get_signal() -> None:
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    while True:
        checkpoint()
        time.sleep(0.01)

listen()
run_async(lambda: in_thread(get_signal))
"""


def test_signal_that_another_thread_got() -> None:
    """A signal is heard although nothing else wakes the thread that has to act on it."""
    answer = subprocess.run(
        [sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stderr.startswith("interrupted; nothing was left behind")


def test_heard_before_anything_is_loaded() -> None:
    """What the program imports before it hears signals is next to nothing."""
    program = """
import sys
before = set(sys.modules)
import torpor.cli.start
print(*sorted(name for name in set(sys.modules) - before if "." not in name))
"""
    words = [sys.executable, "-X", "frozen_modules=on", "-c", program]
    loaded = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert not {"asyncio", "socket", "typer", "subprocess"} & set(loaded.stdout.split())
