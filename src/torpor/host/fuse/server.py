"""Threads that answer a connection's requests, push pages into the page cache and forget them.

A server is a process that may be killed at any time. Its successor gets the descriptors from who
holds them, and `take_over` has the kernel send again what the dead one had taken: readers only wait
longer. What makes that true:

- The kernel copies a request's bytes from and to memory that is present. A page fault in a process
  that is being killed would fail, and the kernel would end the request with EIO. So requests are
  read into locked memory, and answers are touched before they are written.
- RESEND finds what a server has taken. A dying thread may take one more after that, so the holder
  calls `Connection.resend` again when the dead process has ended with all its threads.
- A page under a READ is locked until the answer, and a thread that pushes or invalidates that page
  waits for the lock, unkillably. So no worker and no main thread may push: a worker might be the
  one to answer, and the main thread's end is what tells the holder of a killed server (see
  `wait_dying`). Both are refused.
- The server process never opens files of its own mount: such a thread would wait for itself, and
  the killed process would not end.
- A request that is sent again has UNIQUE_RESEND in its id; answers carry the id as it came. It may
  be served twice at once. The first answer whose id is known wins, the other gets ENOENT.
- The kernel tells an interruption again after a request was sent again.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from torpor.errors import Damaged, InternalError
from torpor.host.fuse import answers, protocol
from torpor.host.fuse.files import Call
from torpor.host.fuse.layouts import ROOT_ID, UNIQUE_RESEND, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torpor.host.fuse.connection import Connection
    from torpor.host.fuse.files import Buffer, Data, Files, Node
    from torpor.host.fuse.protocol import Body, Header

    Trace = Callable[[str, Header], None]

log = logging.getLogger("torpor.host.fuse")

_MAP_LOCKED: Final = 0x2000  # bits/mman-map-flags-generic.h
_EARLY_INTERRUPTS: Final = 1024


class Server:
    """Answers one connection in `workers` threads; ends with the mount or with its process.

    One of them takes requests and answers them, until it handles one that may wait: the handler
    says so (`Call.may_wait`), and another goes on. One that waits without saying so holds up all
    requests. A read that waits keeps its worker, so there must be more workers than reads that may
    wait at once, or others wait behind them.

    `trace` is called in a worker's thread with "taken" and a request's header before it is served,
    with "answering" and "answered" round the write: named places for tests and timings.
    """

    def __init__(
        self,
        connection: Connection,
        files: Files,
        *,
        workers: int = 8,
        trace: Trace = lambda place, header: None,
    ) -> None:
        self._connection = connection
        self._files = files
        self._trace = trace
        self._seat = _Seat()
        self._calls = _Calls(self._seat.leave)
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(connection.descriptors[number % len(connection.descriptors)],),
                name=f"fuse-{number}",
                daemon=True,
            )
            for number in range(workers)
        ]
        self._answer: dict[int, Callable[[Header, Body], Sequence[Buffer]]] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: self._open,
            Opcode.READ: self._read,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.STATFS: self._statfs,
            Opcode.ACCESS: self._access,
            Opcode.RELEASE: lambda header, body: (),
            Opcode.RELEASEDIR: lambda header, body: (),
            Opcode.DESTROY: lambda header, body: (),
        }

    def start(self) -> None:
        """Serve a connection that no server has served yet."""
        for thread in self._threads:
            thread.start()

    def take_over(self) -> None:
        """Serve a connection whose server is dead or dying, with all that it left unanswered.

        Raises HostUnfit when the kernel cannot send requests again: unmount then. Raises
        OSError(ENODEV) after the end of the mount.
        """
        self._connection.require_resend()
        self._drop_interrupts()
        self._connection.resend()
        self.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the mount has ended and all workers with it; False when time is up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def store(self, node: Node, offset: int, data: Data) -> None:
        """Put pages of a file into the page cache: whole pages, at most 1 MiB a call.

        Waits while one of these pages is under a READ that is not answered, so it must be called in
        a thread of its own kind: InternalError in a worker or in the main thread. Raises
        FileNotFoundError when the kernel does not know the node (nobody looked it up, it was
        forgotten, or the mount has ended: there is no page cache to put into); newer kernels say
        OSError(EINVAL) after the end of the mount.
        """
        self._notify(answers.encode_store(node, offset, _pieces(data)))

    def invalidate(self, node: Node, offset: int = 0, length: int = 0) -> None:
        """Drop a range of a file from the page cache; length 0 is to its end.

        Threads and errors as for `store`. Mapped pages go, too; what a private mapping has written
        stays.
        """
        self._notify(answers.encode_invalidate_inode(node, offset, length))

    def forget(self, parent: Node, name: str) -> None:
        """Make the kernel ask for a name again. Threads and errors as for `store`.

        It waits for lookups in that directory.
        """
        self._notify(answers.encode_invalidate_entry(parent.id, name))

    def _notify(self, message: Sequence[Buffer]) -> None:
        current = threading.current_thread()
        if current is threading.main_thread() or current in self._threads:
            raise InternalError(
                f"thread {current.name} must not push pages",
                reason="it would wait for page locks that it has to free, or hide a kill",
            )
        os.writev(self._connection.descriptors[0], _present(message))

    def _drop_interrupts(self) -> None:
        """Empty the queue of interruptions that the dead server did not fetch.

        Kernels from 6.9 on free a request that was sent again and whose waiter was killed although
        it stands in that queue still. Interruptions come first, so at most one other request is
        read here, and is sent again with the rest.
        """
        descriptor = self._connection.descriptors[0]
        buffer = _locked_memory()
        os.set_blocking(descriptor, False)
        try:
            opcode: int = Opcode.INTERRUPT
            while opcode == Opcode.INTERRUPT:
                length = os.readv(descriptor, [buffer])
                opcode = protocol.decode_header(memoryview(buffer)[:length]).opcode
        except BlockingIOError:
            pass
        finally:
            os.set_blocking(descriptor, True)

    def _work(self, descriptor: int) -> None:
        buffer = memoryview(_locked_memory())
        try:
            while True:
                self._seat.take()
                try:
                    length = os.readv(descriptor, [buffer])
                except OSError as error:
                    match error.errno:
                        case errno.ENODEV:  # unmounted
                            return
                        case errno.ENOENT | errno.EAGAIN:  # interrupted, or being taken over
                            continue
                    raise
                self._serve(descriptor, buffer[:length])
        finally:
            self._seat.leave()

    def _serve(self, descriptor: int, message: memoryview) -> None:
        try:
            header = protocol.decode_header(message)
        except Damaged:
            log.exception("the kernel's message is not understood")
            return
        self._trace("taken", header)
        answer = self._answer_to(header, message)
        if header.opcode in protocol.SILENT:
            return
        self._trace("answering", header)
        try:
            os.writev(descriptor, _present(answer))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.exception("the kernel refuses the answer to %s", header)
        self._trace("answered", header)

    def _answer_to(self, header: Header, message: memoryview) -> list[Buffer]:
        try:
            body = protocol.decode_body(header, message)
            if isinstance(body, protocol.Interrupt):
                self._calls.interrupt(body.unique)
                return []
            if header.opcode in protocol.WRITING:
                return answers.encode_error(header.unique, errno.EROFS)
            if header.opcode not in self._answer:
                return answers.encode_error(header.unique, errno.ENOSYS)
            return answers.encode_answer(header.unique, self._answer[header.opcode](header, body))
        except OSError as error:
            return answers.encode_error(header.unique, error.errno or errno.EIO)
        except Exception:
            log.exception("%s failed", header)
            return answers.encode_error(header.unique, errno.EIO)

    def _lookup(self, header: Header, body: Body) -> Sequence[Buffer]:
        assert isinstance(body, protocol.Lookup)
        try:
            name = body.name.decode()
        except UnicodeDecodeError:
            raise FileNotFoundError(errno.ENOENT, "not UTF-8") from None
        parent = self._files.node(header.node)
        return [answers.encode_entry(self._files.lookup(parent, name))]

    def _getattr(self, header: Header, body: Body) -> Sequence[Buffer]:
        return [answers.encode_attributes(self._files.node(header.node))]

    def _open(self, header: Header, body: Body) -> Sequence[Buffer]:
        node = self._files.node(header.node)
        if node.is_directory:
            return [answers.encode_open(answers.DIRECTORY_OPEN_FLAGS)]
        return [answers.encode_open(answers.FILE_OPEN_FLAGS)]

    def _read(self, header: Header, body: Body) -> Sequence[Buffer]:
        assert isinstance(body, protocol.Read)
        node = self._files.node(header.node)
        length = max(0, min(body.size, node.size_bytes - body.offset))
        if length == 0:
            return ()
        call = self._calls.begin(header.unique)
        try:
            data = _pieces(self._files.read(node, body.offset, length, call))
        finally:
            self._calls.end(header.unique, call)
        found = sum(map(len, data))
        if found != length:  # the kernel would take a short answer for the end of the file
            raise Damaged(
                f"{found} bytes read of {'/'.join(node.parts)} at {body.offset}",
                reason=f"{length} were asked for",
            )
        return data

    def _readdir(self, header: Header, body: Body) -> Sequence[Buffer]:
        assert isinstance(body, protocol.Read)
        directory = self._files.node(header.node)
        entries = self._files.entries(directory)
        plus = header.opcode == Opcode.READDIRPLUS
        return [answers.encode_directory(directory, entries, body, plus=plus)]

    def _statfs(self, header: Header, body: Body) -> Sequence[Buffer]:
        sizes = Counter[str]()
        todo = [self._files.node(ROOT_ID)]
        while todo:
            for node in self._files.entries(todo.pop()):
                sizes.update(files=1, size_bytes=node.size_bytes)
                if node.is_directory:
                    todo.append(node)
        return [answers.encode_statfs(sizes["size_bytes"], sizes["files"])]

    def _access(self, header: Header, body: Body) -> Sequence[Buffer]:
        """The kernel checks modes itself (default_permissions); what remains is that it exists."""
        self._files.node(header.node)
        return ()


class _Seat:
    """The place at the device, for one worker at a time.

    Threads of one interpreter that run at once spend more on handing its lock to each other than
    they gain: ARCHITECTURE.md has the figures.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder = 0

    def take(self) -> None:
        """Sit down, when whoever sits there has left; who sits there already stays."""
        current = threading.get_ident()
        if self._holder != current:
            self._lock.acquire()
            self._holder = current

    def leave(self) -> None:
        """Let another sit down; nothing happens if the caller does not sit there."""
        if self._holder == threading.get_ident():
            self._holder = 0
            self._lock.release()


class _Calls:
    """The reads under way by request id, and interruptions that came before their request.

    Another worker may fetch the INTERRUPT before the first one has put its request down here.
    """

    def __init__(self, may_wait: Callable[[], None]) -> None:
        self._may_wait = may_wait
        self._lock = threading.Lock()
        self._calls: dict[int, list[Call]] = {}
        self._early: dict[int, None] = {}

    def begin(self, unique: int) -> Call:
        unique &= ~UNIQUE_RESEND
        call = Call(self._may_wait)
        with self._lock:
            self._calls.setdefault(unique, []).append(call)
            early = unique in self._early
            self._early.pop(unique, None)
        if early:
            call.interrupt()
        return call

    def end(self, unique: int, call: Call) -> None:
        unique &= ~UNIQUE_RESEND
        with self._lock:
            calls = self._calls[unique]
            calls.remove(call)
            if not calls:
                del self._calls[unique]

    def interrupt(self, unique: int) -> None:
        unique &= ~UNIQUE_RESEND
        with self._lock:
            calls = list(self._calls.get(unique, ()))
            if not calls:
                self._early[unique] = None
                while len(self._early) > _EARLY_INTERRUPTS:
                    del self._early[next(iter(self._early))]
        for call in calls:
            call.interrupt()


def _pieces(data: Data) -> Sequence[Buffer]:
    return data if isinstance(data, (list, tuple)) else [data]  # type: ignore[list-item]


def _present(message: Sequence[Buffer]) -> Sequence[Buffer]:
    """The same message, each of its pages touched."""
    for piece in message:
        view = memoryview(piece)
        view[:: protocol.PAGE_BYTES].tobytes()
        view[-1:].tobytes()
    return message


def _locked_memory() -> mmap.mmap:
    """A request buffer that is present, stays present, and is not shared with forked children."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | _MAP_LOCKED
    memory = mmap.mmap(-1, protocol.REQUEST_BYTES, flags=flags)
    memory.madvise(mmap.MADV_DONTFORK)
    return memory
