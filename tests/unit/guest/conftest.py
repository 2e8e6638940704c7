"""The guest's init, compiled once and run on this host as an agent."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from torpor.host.process import ProcessId
from torpor.image.agent import AgentClient
from torpor.image.kernel import compile_init

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class RunningAgent:
    """An agent process with its root directory and port."""

    process: subprocess.Popen[str]
    root: Path
    port: int

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """A raw connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            yield connection

    @contextlib.contextmanager
    def client(self) -> Iterator[AgentClient]:
        """A connection with the client that torpor uses."""
        with self.connect() as connection:
            yield AgentClient(connection, timeout_s=20)

    def end(self) -> str:
        """End the agent and all that it started; what they wrote to the console."""
        for child in descendants(self.process.pid):
            child.kill()
        self.process.kill()
        return self.process.communicate(timeout=20)[1]


def descendants(pid: int) -> list[ProcessId]:
    """All processes below `pid`; the agent is the reaper of every orphan among them."""
    found = []
    for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            found += [ProcessId.of(int(text)), *descendants(int(text))]
    return found


@pytest.fixture(scope="session")
def init_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled init."""
    target = tmp_path_factory.mktemp("init") / "init"
    compile_init(target)
    return target


@pytest.fixture
def agent(init_program: Path, tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent of its own for each test."""
    root = tmp_path / "root"
    root.mkdir()
    process = subprocess.Popen(
        [init_program, "--agent", "127.0.0.1:0", "--root", root],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first_line = process.stderr.readline()
    running = RunningAgent(process, root, int(first_line.rpartition(":")[2]))
    try:
        yield running
    finally:
        if process.poll() is None:
            running.end()
