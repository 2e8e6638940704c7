"""The pager as its node sees it: started when it is needed, asked, ended, cleaned up after."""

from __future__ import annotations

import base64
import contextlib
import os
import select
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from torpor.errors import HostUnfit
from torpor.host.cancel import checkpoint, interruptible
from torpor.host.fuse.connection import find_device, unmount
from torpor.host.lock import exclusive
from torpor.host.process import find_processes_in, spawn
from torpor.pager import control
from torpor.pager.control import PagerGone
from torpor.pager.keeper import Job, Places
from torpor.pager.spans import Span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torpor.config import Settings
    from torpor.pager.source import Source
    from torpor.units import Digest

_START_S: Final = 30.0
_STOP_S: Final = 20.0
_LOCK_S: Final = 60.0
_TRIES: Final = 40
_LOOK_AGAIN_S: Final = 0.05
_LAST_LINES: Final = 15
_PASSED: Final = ("TORPOR_PAGER_BARRIER", "AWS_")
_ALLOCATOR: Final = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
"""For mallopt(3): few arenas, so that one thread's freed memory is another one's.

It is kept: a buffer in memory that is new to the process costs a fault and a zeroing for each page
of it, two fifths of what a push takes.
"""


@dataclass(frozen=True)
class Served:
    """An open snapshot: where its files are, by name: memory, and the image and app that lack.

    `outline`: what the ref says of its manifest while that is still to come, else empty. `spans`:
    when the pager did what of the opening.
    """

    digest: Digest
    files: dict[str, Path]
    outline: bytes = b""
    spans: tuple[Span, ...] = ()


class PagerClient:
    """One node's pager. Blocking; any thread. Nothing is started before it is needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = Places(settings.home.resolve())  # as the kernel lists mounts

    def ensure(self) -> None:
        """Have a keeper and a pager running.

        A pager whose keeper died gets a new one. Raises HostUnfit with what the log says.
        """
        self._complete(begin=True)

    def open(
        self,
        reference: str,
        source: Source,
        *,
        expect: Digest | None = None,
        here: Sequence[str] = (),
        push: bool = True,
    ) -> Served:
        """Open a snapshot; it then is among the node's. Raises what the pager raises."""
        for _ in range(_TRIES):
            begun = self.begin(reference, source, expect=expect, here=here, push=push)
            spans = self.complete(begun.digest)
            if spans is not None:
                return replace(begun, spans=spans)
        raise PagerGone("the pager ended", reason="again and again while it opened a snapshot")

    def begin(
        self,
        reference: str,
        source: Source,
        *,
        expect: Digest | None = None,
        here: Sequence[str] = (),
        push: bool = True,
        ref: bytes = b"",
    ) -> Served:
        """Begin to open a snapshot: its files are served, but it is not among the node's yet.

        `ref` is its ref's object, if that was just read.
        """
        answer = self._ask(
            "begin",
            start=True,
            reference=reference,
            source=msgspec.to_builtins(source),
            expect=expect,
            here=list(here),
            push=push,
            ref=base64.b64encode(ref).decode(),
        )
        files = {
            name: self._places.mount.joinpath(*parts) for name, parts in answer["files"].items()
        }
        return Served(answer["digest"], files, answer["outline"].encode())

    def complete(self, digest: Digest) -> tuple[Span, ...] | None:
        """Wait until what was begun is among the node's snapshots; when the pager did what of it.

        None if another pager began it, which has died. Raises what the pager raises.
        """
        answer = self._ask("complete", digest=digest)
        return tuple(Span(*span) for span in answer["spans"]) if answer["known"] else None

    def prepare(self, source: Source) -> None:
        """Start the pager and let it connect to a store. Raises HostUnfit, StoreError."""
        self._ask("prepare", start=True, source=msgspec.to_builtins(source))

    def go(self, digest: Digest) -> None:
        """Push its working set, now that its files are open somewhere."""
        self._ask("go", digest=digest)

    def wait_pushed(self, digest: Digest, *, timeout_s: float) -> bool:
        """Whether the push ended in time."""
        return bool(self._ask("wait_pushed", digest=digest, timeout_s=timeout_s)["ended"])

    def hydrate(self, digest: Digest, *, limit_bytes: int, limit_s: float) -> None:
        """Fetch the rest in the background, within bounds."""
        self._ask("hydrate", digest=digest, limit_bytes=limit_bytes, limit_s=limit_s)

    def wait_hydrated(self, digest: Digest, *, timeout_s: float) -> bool:
        """Whether hydration ended in time with everything here."""
        answer = self._ask("wait_hydrated", digest=digest, timeout_s=timeout_s)
        return bool(answer["ended"] and answer["complete"])

    def close(self, digest: Digest) -> int:
        """Serve a snapshot no more; how many stay open. 0 without a pager."""
        try:
            return int(self._ask("close", digest=digest)["open"])
        except PagerGone:
            return 0

    def failure(self, digest: Digest) -> str:
        """Why a window of a snapshot could not be had; empty if all could.

        Only a pager that runs is asked: a new one would know of no failure.
        """
        return self._trouble("failure", digest)

    def waiting(self, digest: Digest) -> str:
        """The window of a snapshot that a reader waits for longest, if that is long; else empty."""
        return self._trouble("waiting", digest)

    def opened(self) -> list[Digest]:
        """The snapshots that are open."""
        return list(self._ask("opened")["digests"])

    def image_path(self, digest: Digest) -> Path:
        """Where an image is while it is served."""
        return self._places.mount / "images" / digest

    def counters(self) -> dict[str, Any]:
        """What was counted; see `Pager.counters`. Raises PagerGone without a pager."""
        return self._ask("counters")

    def is_running(self) -> bool:
        """Whether a pager answers."""
        return self._answers()

    @property
    def mount(self) -> Path:
        """The mount point; served files are below it."""
        return self._places.mount

    def mounted(self) -> str | None:
        """Which mount serves now, `major:minor` of its device; None without one."""
        return find_device(self._places.mount)

    def stop(self) -> None:
        """End pager and keeper, unmount, delete. VMs that map its files end."""
        with self._lock():
            if self._answers():
                keeper = self._places.identity("keeper")  # it deletes this before it ends
                with contextlib.suppress(PagerGone):
                    self._ask_once("stop", within_s=_STOP_S)
                if keeper is not None:
                    keeper.wait(timeout_s=_STOP_S)
            self._clear()

    def reconcile(self) -> bool:
        """Remove what dead keepers and pagers left; whether a pager is running.

        A pager whose keeper died gets a new one. Raises HostUnfit when that does not start.
        """
        if not self._places.directory.exists():
            return False
        if self._answers():
            self._complete(begin=False)
            return True
        with self._lock():
            if not self._answers():
                self._clear()
                return False
        return True

    # inside

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        path = self._settings.home / "locks" / "pager"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return exclusive(path, timeout_s=_LOCK_S, what="this home's pager")

    def _lives(self, who: str) -> bool:
        identity = self._places.identity(who)
        return identity is not None and identity.is_alive()

    def _is_complete(self) -> bool:
        return self._lives("keeper") and self._answers()

    def _answers(self) -> bool:
        """Whether a process of the recorded pair is alive and the socket is there."""
        alive = self._lives("pager") or self._lives("keeper")
        return alive and (self._places.directory / control.SOCKET_NAME).exists()

    def _complete(self, *, begin: bool) -> None:
        """Give a pager without a keeper one; where there is no pager, only `begin` starts one."""
        if self._is_complete():
            return
        with self._lock():
            if self._is_complete() or (self._lives("pager") and self._start(adopt=True)):
                return
            if begin:
                self._clear()
                self._places.directory.mkdir(mode=0o700)
                self._start(adopt=False)

    def _trouble(self, what: str, digest: Digest) -> str:
        for _ in range(_TRIES):
            if not self._answers():
                break
            with contextlib.suppress(PagerGone):
                return str(self._ask_once("failure", digest=digest)[what])
            checkpoint()
            time.sleep(_LOOK_AGAIN_S)
        return "the pager ended"

    def _ask(self, op: str, *, start: bool = False, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        """Ask, again while the keeper replaces a pager that died; every request may be repeated.

        Without `start` PagerGone is raised where neither of them lives. When the work is cancelled
        (see `host.cancel`) nobody waits for the answer; what was asked for may happen.
        """
        for attempt in range(_TRIES):
            checkpoint()
            if not start and not self._answers():
                raise PagerGone("no pager is running")
            self._complete(begin=start)
            try:
                return self._ask_once(op, **arguments)
            except PagerGone:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(_LOOK_AGAIN_S)
        raise AssertionError("the loop returns or raises")

    def _ask_once(
        self,
        op: str,
        *,
        within_s: float | None = None,
        **arguments: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        line = control.connect(self._places.directory, timeout_s=within_s)
        try:
            with interruptible(line.connection):
                return line.ask(op, **arguments)
        finally:
            line.close()

    def _start(self, *, adopt: bool) -> bool:
        """Start a keeper; False if it was to adopt a pager that has ended meanwhile.

        Raises HostUnfit, leaving nothing but a pager that lives.
        """
        self._reap()
        ready, tell = os.pipe()
        log = self._places.directory / "log"
        try:
            job = Job(
                home=str(self._places.home),
                cache_bytes=self._settings.cache_bytes,
                deadline_s=self._settings.pager_deadline_s,
                adopt=adopt,
                ready=tell,
            )
            keeper = spawn(
                [sys.executable, "-m", "torpor.pager.keeper", msgspec.json.encode(job).decode()],
                log=log,
                cwd=self._places.directory,
                env=_ALLOCATOR | {k: v for k, v in os.environ.items() if k.startswith(_PASSED)},
                pass_fds=[tell],
            )
        finally:
            os.close(tell)
        try:
            if select.select([ready], [], [], _START_S)[0] and os.read(ready, 16):
                return True
        finally:
            os.close(ready)
        keeper.kill()
        if adopt and not self._lives("pager"):
            return False
        words = log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
        if not adopt:
            self._clear()
        raise HostUnfit(
            "the pager did not start",
            reason="\n".join(words),
            hint="`torpor doctor` tells whether this host can run it",
        )

    def _reap(self) -> None:
        """Let go of a dead keeper that was this process's child."""
        keeper = self._places.identity("keeper")
        if keeper is not None:
            keeper.wait(timeout_s=0)

    def _clear(self) -> None:
        """Remove everything of a pager that does not answer; the caller holds the lock.

        That is what is written down, and what was killed before it could write itself down.
        """
        if not self._places.directory.exists():
            return
        unmount(self._places.mount)  # a thread that waits for a page of it ends first
        for who in ("keeper", "pager"):
            identity = self._places.identity(who)
            if identity is not None:
                identity.kill()
        while found := find_processes_in(self._places.directory):
            unmount(self._places.mount)
            for identity in found:
                identity.kill()
        self._places.remove()
