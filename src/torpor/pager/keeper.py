"""The keeper: holds the mount's descriptors and the socket, and replaces a pager that dies.

It does nothing else, so that nothing of its own can end it. It forks the pager, which therefore
starts within milliseconds. A keeper that dies leaves a pager that goes on; the next client starts a
new keeper, which takes the descriptors from the pager.

    HOME/pager/mount    the mount point            HOME/pager/control  the socket
    HOME/pager/keeper   pid and start time of the keeper, `pager` of the pager
    HOME/pager/open/    what is open               HOME/pager/log      what both have to say
    HOME/pager/ended    the pager ended in order
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

from torpor.errors import TorporError
from torpor.host.fuse.connection import Connection, unmount, wait_dying
from torpor.host.process import ProcessId
from torpor.pager import control, process
from torpor.pager.logs import BoundedLog
from torpor.pager.pager import Limits
from torpor.snapshot.windows import WINDOW_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

_RESTARTS: Final = 40
_RESTARTS_WITHIN_S: Final = 10.0
_FOREVER_S: Final = 3600.0
_LOOK_AGAIN_S: Final = 0.05
_ADOPT_S: Final = 20.0
_DIE_S: Final = 10.0
_ENDING: Final = {signal.SIGTERM, signal.SIGINT}
_ENDED: Final = "ended"
_DESCRIPTORS: Final = 4

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
        self._dying: list[ProcessId] = []
        self._asked_to_end = False
        self._trace = barrier()

    def run(self) -> None:
        """Mount or adopt, keep a pager alive, clean up when it ended in order.

        Raises HostUnfit, OSError, PagerGone when it cannot begin.
        """
        for signum in _ENDING:
            signal.signal(signum, self._pass_on)
        gc.freeze()
        connection, listener, pager = self._adopt() if self._job.adopt else self._begin()
        try:
            self._places.record("keeper", ProcessId.of(os.getpid()))
            if pager is None:
                pager = self._fork(connection, listener, take_over=False)
            os.write(self._job.ready, b"ready\n")
            os.close(self._job.ready)
            self._dying.append(self._watch(connection, listener, pager))
        finally:
            connection.unmount()  # frees the threads of those that are dying
            listener.close()
            for dead in self._dying:
                dead.wait(timeout_s=_DIE_S)
        shutil.rmtree(self._places.directory, ignore_errors=True)

    def _watch(
        self, connection: Connection, listener: socket.socket, pager: ProcessId
    ) -> ProcessId:
        """Replace each pager that dies; the last one, when it ended in order or none can live.

        What a dead one had taken last is sent again once it has ended with all its threads, which
        may take until its successor has answered: both are waited for.
        """
        while True:
            if wait_dying(pager, timeout_s=_LOOK_AGAIN_S if self._dying else _FOREVER_S):
                if self._ended_in_order() or not self._can_replace(connection):
                    return pager
                log.warning("the pager died pid=%d, starting another", pager.pid)
                self._dying.append(pager)
                pager = self._fork(connection, listener, take_over=True)
            for dead in [dead for dead in self._dying if dead.wait(timeout_s=0)]:
                self._dying.remove(dead)
                with contextlib.suppress(OSError):  # unmounted meanwhile
                    connection.resend()

    def _begin(self) -> tuple[Connection, socket.socket, None]:
        self._places.mount.mkdir(exist_ok=True)
        connection = Connection.mount(
            self._places.mount, descriptors=_DESCRIPTORS, read_ahead_bytes=WINDOW_BYTES
        )
        try:
            return connection, control.listen(self._places.directory), None
        except BaseException:
            connection.unmount()
            raise

    def _adopt(self) -> tuple[Connection, socket.socket, ProcessId]:
        line = control.connect(self._places.directory, timeout_s=_ADOPT_S)
        try:
            line.send({"op": "descriptors"})
            _, numbers, _, _ = socket.recv_fds(line.connection, 1, _DESCRIPTORS + 1)
            answer = line.receive()
        except OSError as error:
            raise control.PagerGone("the pager ended", reason=str(error)) from None
        finally:
            line.close()
        pager = self._places.identity("pager")
        if answer is None or pager is None:
            raise control.PagerGone("the pager ended while its descriptors were taken over")
        *descriptors, listener = numbers
        connection = Connection.adopt(answer["ok"]["connection"], descriptors=descriptors)
        return connection, socket.socket(fileno=listener), pager

    def _fork(
        self, connection: Connection, listener: socket.socket, *, take_over: bool
    ) -> ProcessId:
        """Start a pager, which serves only when its identity is written down."""
        told, tell = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        child = os.fork()
        if child == 0:
            os.close(tell)
            with contextlib.suppress(OSError):
                os.close(self._job.ready)
            if not os.read(told, 1):  # the keeper was killed
                os._exit(1)
            os.close(told)
            _be_pager(connection, listener, self._job, take_over=take_over, trace=self._trace)
        os.close(told)
        identity = ProcessId.of_child(child)
        self._places.record("pager", identity)
        with contextlib.suppress(BrokenPipeError):
            os.write(tell, b"1")
        os.close(tell)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        return identity

    def _ended_in_order(self) -> bool:
        return self._asked_to_end or (self._places.directory / _ENDED).exists()

    def _can_replace(self, connection: Connection) -> bool:
        if not connection.negotiated.has_resend:
            log.error("the pager died, and this kernel cannot send its requests again")
            return False
        now_s = time.monotonic()
        self._deaths = [t for t in self._deaths if now_s - t < _RESTARTS_WITHIN_S]
        self._deaths.append(now_s)
        if len(self._deaths) > _RESTARTS:
            log.error("the pager dies again and again, giving up")
            return False
        return True

    def _pass_on(self, signum: int, frame: object) -> None:
        self._asked_to_end = True
        pager = self._places.identity("pager")
        if pager is not None:
            pager.signal(signal.SIGTERM)


def _be_pager(
    connection: Connection,
    listener: socket.socket,
    job: Job,
    *,
    take_over: bool,
    trace: Callable[[str], None],
) -> None:
    """The forked child: never returns."""
    code = 1
    try:
        limits = Limits(cache_bytes=job.cache_bytes, deadline_s=job.deadline_s)
        process.serve(
            connection, listener, Path(job.home), limits, take_over=take_over, trace=trace
        )
        (Places(Path(job.home)).directory / _ENDED).touch()
        code = 0
    except BaseException:
        log.exception("the pager failed")
    finally:
        logging.shutdown()
        os._exit(code)


def barrier() -> Callable[[str], None]:
    """What happens at named places: nothing, or what TORPOR_PAGER_BARRIER says.

    `PLACE=FILE` kills the process with SIGKILL at PLACE while FILE exists, once: the file is
    removed first. `*=DIR` does so at each place that a file in DIR is named after.
    """
    place, _, file = os.environ.get("TORPOR_PAGER_BARRIER", "").partition("=")
    if not file:
        return lambda name: None

    def reach(name: str) -> None:
        if place in (name, "*"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(file, name) if place == "*" else file)
                os.kill(os.getpid(), signal.SIGKILL)

    return reach


def main() -> int:
    """`python -m torpor.pager.keeper JOB`, as the client starts it."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(BoundedLog(Places(Path(job.home)).directory / "log"))
    try:
        Keeper(job).run()
    except TorporError as error:
        log.error("%s. %s", error, error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
