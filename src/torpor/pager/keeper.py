"""The keeper: holds the mount's descriptors and the socket, and replaces a pager that dies.

It does nothing else, so that nothing of its own can end it. It forks the pager, which therefore
starts within milliseconds. A keeper that dies leaves a pager that goes on; the next client starts a
new keeper, which takes the descriptors from the pager.

    HOME/pager/mount    the mount point            HOME/pager/control  the socket
    HOME/pager/keeper   pid and start time of the keeper, `pager` of the pager
    HOME/pager/open/    what is open               HOME/pager/log      what both have to say
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from torpor.host.fuse.connection import Connection, unmount, wait_dying
from torpor.host.process import ProcessId
from torpor.pager import control, process
from torpor.pager.pager import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

_RESTARTS: Final = 8
_RESTARTS_WITHIN_S: Final = 10.0
_FOREVER_S: Final = 3600.0
_DESCRIPTORS: Final = 4
READ_AHEAD_BYTES: Final = 64 * 1024

log = logging.getLogger("torpor.pager")


class Job(msgspec.Struct, frozen=True):
    """What a keeper is told on its command line."""

    home: str
    cache_bytes: int
    deadline_s: float
    adopt: bool
    ready: int
    """A descriptor to write to when clients can connect."""


@dataclass(frozen=True)
class Places:
    """Paths of a home's pager."""

    home: Path

    @property
    def directory(self) -> Path:
        """All of it is in here."""
        return self.home / "pager"

    @property
    def mount(self) -> Path:
        """The mount point."""
        return self.directory / "mount"

    def identity(self, who: str) -> ProcessId | None:
        """The recorded `keeper` or `pager`, None when there is no readable record."""
        with contextlib.suppress(OSError, ValueError):
            pid, ticks = (self.directory / who).read_text().split()
            return ProcessId(int(pid), int(ticks))
        return None

    def record(self, who: str, identity: ProcessId) -> None:
        """Write an identity down; it appears whole."""
        fresh = self.directory / f".{who}.{os.getpid()}"
        fresh.write_text(f"{identity.pid} {identity.start_ticks}\n")
        fresh.rename(self.directory / who)

    def remove(self) -> None:
        """Unmount and delete everything; no keeper and no pager may be alive."""
        unmount(self.mount)
        shutil.rmtree(self.directory, ignore_errors=True)


class Keeper:
    """One home's keeper."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._places = Places(Path(job.home))
        self._deaths: list[float] = []
        self._asked_to_end = False

    def run(self) -> int:
        """Mount or adopt, keep a pager alive, clean up when it ended in order; the exit code."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._pass_on)
        connection, listener, pager = self._adopt() if self._job.adopt else self._begin()
        self._places.record("keeper", ProcessId.of(os.getpid()))
        if pager is None:
            pager = self._fork(connection, listener, take_over=False)
        os.write(self._job.ready, b"ready\n")
        os.close(self._job.ready)
        while not self._ended_in_order(pager):
            if not self._may_restart():
                log.error("the pager dies again and again, giving up")
                break
            log.warning("the pager died pid=%d, starting another", pager.pid)
            dead, pager = pager, self._fork(connection, listener, take_over=True)
            if dead.wait(timeout_s=_FOREVER_S):
                connection.resend()  # its threads may have taken a last request each
        connection.unmount()
        listener.close()
        shutil.rmtree(self._places.directory, ignore_errors=True)
        return 0

    def _begin(self) -> tuple[Connection, socket.socket, None]:
        self._places.mount.mkdir(exist_ok=True)
        connection = Connection.mount(
            self._places.mount, descriptors=_DESCRIPTORS, read_ahead_bytes=READ_AHEAD_BYTES
        )
        return connection, control.listen(self._places.directory), None

    def _adopt(self) -> tuple[Connection, socket.socket, ProcessId]:
        line = control.connect(self._places.directory)
        line.send({"op": "descriptors"})
        _, numbers, _, _ = socket.recv_fds(line.connection, 1, _DESCRIPTORS + 1)
        answer = line.receive()
        line.close()
        if answer is None:
            raise control.PagerGone("the pager ended while its descriptors were taken over")
        *descriptors, listener = numbers
        connection = Connection.adopt(answer["ok"]["connection"], descriptors=descriptors)
        pager = self._places.identity("pager")
        assert pager is not None
        return connection, socket.socket(fileno=listener), pager

    def _fork(
        self, connection: Connection, listener: socket.socket, *, take_over: bool
    ) -> ProcessId:
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(tell)
            os.read(told, 1)  # the pager serves only when its identity is written down
            os.close(told)
            _be_pager(connection, listener, self._job, take_over=take_over)
        identity = ProcessId.of(child)
        self._places.record("pager", identity)
        os.close(told)
        os.close(tell)
        return identity

    def _ended_in_order(self, pager: ProcessId) -> bool:
        """Wait for the pager's end, or for what will be it; whether it was asked to end."""
        while not wait_dying(pager, timeout_s=_FOREVER_S):
            pass
        with contextlib.suppress(ChildProcessError):
            done, status = os.waitpid(pager.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
        return self._asked_to_end or (self._places.directory / "ended").exists()

    def _may_restart(self) -> bool:
        now_s = time.monotonic()
        self._deaths = [t for t in self._deaths if now_s - t < _RESTARTS_WITHIN_S]
        self._deaths.append(now_s)
        return len(self._deaths) <= _RESTARTS

    def _pass_on(self, signum: int, frame: object) -> None:
        self._asked_to_end = True
        pager = self._places.identity("pager")
        if pager is not None:
            pager.signal(signal.SIGTERM)


def _be_pager(
    connection: Connection, listener: socket.socket, job: Job, *, take_over: bool
) -> None:
    """The forked child: never returns."""
    code = 1
    try:
        gc.freeze()
        limits = Limits(cache_bytes=job.cache_bytes, deadline_s=job.deadline_s)
        process.serve(
            connection, listener, Path(job.home), limits, take_over=take_over, trace=barrier()
        )
        (Places(Path(job.home)).directory / "ended").touch()  # for a keeper that is no parent
        code = 0
    except BaseException:
        log.exception("the pager failed")
    finally:
        logging.shutdown()
        os._exit(code)


def barrier() -> Callable[[str], None]:
    """What happens at named places: nothing, or what TORPOR_PAGER_BARRIER says.

    `PLACE=FILE` kills the process with SIGKILL at PLACE while FILE exists, once: the file is
    removed first.
    """
    place, _, file = os.environ.get("TORPOR_PAGER_BARRIER", "").partition("=")
    if not file:
        return lambda name: None

    def reach(name: str) -> None:
        if name == place:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
                os.kill(os.getpid(), signal.SIGKILL)

    return reach


def main() -> int:
    """`python -m torpor.pager.keeper JOB`, as the client starts it."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    form = "%(asctime)s level=%(levelname)s pid=%(process)d logger=%(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=form)
    return Keeper(job).run()


if __name__ == "__main__":
    sys.exit(main())
