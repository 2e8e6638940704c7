"""The one door for child processes.

Every child gets a clean environment, /dev/null as standard input and a descriptor table without
our own files. A process is known by its pid together with its start time (field 22 of
/proc/PID/stat, proc(5)), so a reused pid is never mistaken for ours, and is signalled through a
pidfd.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import select
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torpor.errors import DeadlineExceeded, HostUnfit, ProgramFailed
from torpor.host.cancel import Cancelled, checkpoint, current_token, uncancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for another: pid and start time in clock ticks."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a live process; raises ProcessLookupError if there is none."""
        state, start_ticks = _stat(pid)
        if state == "Z":
            raise ProcessLookupError(pid)
        return cls(pid, start_ticks)

    @classmethod
    def of_child(cls, pid: int) -> ProcessId:
        """The identity of our own child that nobody has reaped yet; it may have ended."""
        return cls(pid, _stat(pid)[1])

    def is_alive(self) -> bool:
        """Whether this very process runs (a zombie does not)."""
        try:
            state, start_ticks = _stat(self.pid)
        except ProcessLookupError:
            return False
        return start_ticks == self.start_ticks and state != "Z"

    def cpu_ticks(self) -> int:
        """Processor time so far of all its threads, in clock ticks; 0 when the process is gone."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return int(fields[11]) + int(fields[12])

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal; does nothing when the process is gone."""
        with contextlib.suppress(ProcessLookupError), _pidfd(self) as fd:
            signal.pidfd_send_signal(fd, signum)

    def kill(self, *, timeout_s: float = 10) -> None:
        """SIGKILL, wait for the end and reap it if it is our child. Raises DeadlineExceeded."""
        self.signal(signal.SIGKILL)
        with uncancelled():
            ended = self.wait(timeout_s=timeout_s)
        if not ended:
            raise DeadlineExceeded(
                f"process {self.pid} did not end within {timeout_s} s of SIGKILL"
            )

    def wait(self, *, timeout_s: float) -> bool:
        """Wait until the process has ended; False if it runs on. Reaps our own children.

        Raises Cancelled when the work that it is part of is cancelled (see `host.cancel`).
        """
        with contextlib.suppress(ProcessLookupError), _pidfd(self) as fd:
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            token = current_token()
            if token is not None:
                poller.register(token.fd, select.POLLIN)
            ready = {ready for ready, _ in poller.poll(timeout_s * 1000)}
            if fd not in ready:
                checkpoint()
                return False
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        return True


_spawned: set[ProcessId] = set()


def reap_spawned() -> None:
    """Reap what `spawn` started here and has ended, whoever ended it. Any thread.

    A process that stays for long calls it from time to time; others leave that to init.
    """
    for identity in list(_spawned):
        if not identity.is_alive():
            identity.wait(timeout_s=0)
            _spawned.discard(identity)


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time of a process, from /proc/PID/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


@contextlib.contextmanager
def _pidfd(identity: ProcessId) -> Iterator[int]:
    fd = os.pidfd_open(identity.pid)
    try:
        if _stat(identity.pid)[1] != identity.start_ticks:
            raise ProcessLookupError(identity.pid)
        yield fd
    finally:
        os.close(fd)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of every child: a fixed path, the C locale, proxies kept, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    home = os.environ.get("HOME", "/root")
    return {"PATH": _PATH, "LC_ALL": "C.UTF-8", "HOME": home, **kept, **(extra or {})}


def run(
    argv: Sequence[str | Path],
    *,
    input_bytes: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    hint: str = "",
) -> str:
    """Run a program to its end and return its standard output as text.

    The child is killed when the calling work is cancelled (see `host.cancel`) or at the deadline.
    Raises ProgramFailed (with the command ready to paste and the last lines of its standard
    error), HostUnfit when the program is not installed, DeadlineExceeded.
    """
    words = [str(word) for word in argv]
    child = _popen(words, cwd=cwd, env=env, stdin=input_bytes is not None)
    token = current_token()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        pending = input_bytes
        while True:
            try:
                out, err = child.communicate(pending, timeout=0.1)
                break
            except subprocess.TimeoutExpired:
                pending = None
                if token is not None and token.is_set():
                    raise Cancelled from None
                if deadline is not None and time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"{words[0]} did not end within {timeout_s} s", reason=shlex.join(words)
                    ) from None
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode != 0:
        raise ProgramFailed(
            f"{words[0]} exited with {_status(child.returncode)}",
            reason=_tail(err or out),
            hint=hint or f"the command was: {shlex.join(words)}",
        )
    return str(out.decode(errors="replace"))


def spawn(
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    prepare: Callable[[], None] | None = None,
) -> ProcessId:
    """Start a program that outlives us, in a session of its own; its output is appended to `log`.

    `prepare` runs first, in a thread that does nothing else and ends: what it sets for its thread
    the program inherits. Raises HostUnfit when the program is not installed. The caller ends it by
    the returned identity.
    """
    if prepare is not None:

        def start() -> ProcessId:
            prepare()
            return spawn(argv, log=log, cwd=cwd, env=env, pass_fds=pass_fds)

        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(start).result()
    words = [str(word) for word in argv]
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=clean_environment(env),
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise _not_installed(words[0]) from None
    try:
        identity = ProcessId.of_child(child.pid)
    finally:
        child.returncode = 0  # ours to reap through ProcessId.wait, not Popen's
    _spawned.add(identity)
    return identity


def _popen(
    words: list[str], *, cwd: Path | None, env: Mapping[str, str] | None, stdin: bool
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=clean_environment(env),
            start_new_session=True,
        )
    except FileNotFoundError:
        raise _not_installed(words[0]) from None


def _not_installed(program: str) -> HostUnfit:
    return HostUnfit(f"{program} is not installed", hint="run `torpor doctor`, or `make setup`")


def _status(returncode: int) -> str:
    if returncode < 0:
        return f"signal {signal.Signals(-returncode).name}"
    return f"status {returncode}"


def _tail(output: bytes, lines: int = 12) -> str:
    return "\n".join(output.decode(errors="replace").strip().splitlines()[-lines:])


def find_processes_in(directory: Path) -> list[ProcessId]:
    """Live processes whose working directory is `directory` or below it (proc(5), /proc/PID/cwd).

    A directory that only torpor makes is a name of its own: this finds a child whose maker died
    before it could write the pid down. Also found is one whose root directory is there: its working
    directory has no name outside.
    """
    wanted = os.path.realpath(directory)
    jails = functools.cache(lambda: {_place(path) for path, _, _ in os.walk(wanted)})
    ours = _place("/")
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            where = os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)")
            root = _place(f"/proc/{entry}/root")
            inside = where == wanted or where.startswith(f"{wanted}/")
            if not inside and root != ours:
                os.readlink(f"/proc/{entry}/exe")  # kernel threads have roots, but no program
            if inside or (root != ours and root in jails()):
                found.append(ProcessId.of(int(entry)))
    return found


def _place(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
