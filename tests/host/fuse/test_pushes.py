"""Pages that a server puts into the page cache, and takes away."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.fuse_server import expected
from torpor.host.fuse.layouts import Opcode
from torpor.units import MiB

if TYPE_CHECKING:
    from conftest import Mount
    from fixtures.fuse_server import ServerProcess

pytestmark = pytest.mark.host

SIZE = 4 * MiB + 1234
WRITEV = {"x86_64": "20", "aarch64": "66"}


def push(server: ServerProcess, what: str, **arguments: object) -> int:
    """Have a page pushed or taken away; the errno of it, 0 for success."""
    server.send(what, path="memory", **arguments)
    return int(server.expect("pushed")["error"])


def reads(server: ServerProcess) -> list[tuple[int, int]]:
    """Offset and length of the reads that reached the handler."""
    events = server.drain()
    return [(event["offset"], event["length"]) for event in events if event["event"] == "read"]


def test_pushed_pages_are_read_without_the_server(mount: Mount) -> None:
    """A mapping sees what was pushed, the last odd bytes too, and no read reaches the handler.

    The pushed bytes are another file's, so that they cannot have come by a read.
    """
    holder = mount({"memory": SIZE})
    server = holder.serve(tell=["read"])
    start = 3 * MiB
    reader = holder.read("mapped_later", "memory", start, SIZE - start)
    assert reader.line() == "mapped"
    for offset, length in ((start, MiB), (4 * MiB, 1234)):
        assert push(server, "store", offset=offset, length=length, **{"as": "other"}) == 0
    reader.go()
    assert reader.result() == expected("other", start, SIZE - start)
    assert reads(server) == []


def test_unread_file_cannot_be_pushed(mount: Mount) -> None:
    """Before anybody looked the file up there is no page cache: ENOENT."""
    holder = mount({"memory": SIZE})
    server = holder.serve()
    assert push(server, "store", offset=0, length=4096) == errno.ENOENT
    assert push(server, "invalidate") == errno.ENOENT


def test_invalidated_pages_are_read_again(mount: Mount) -> None:
    """After an invalidation the handler is asked again."""
    holder = mount({"memory": SIZE})
    server = holder.serve(tell=["read"])
    assert holder.read("whole", "memory").result() == expected("memory", 0, SIZE)
    assert push(server, "store", offset=0, length=4096, **{"as": "other"}) == 0
    reads(server)
    assert holder.read("range", "memory", 0, 4096).result() == expected("other", 0, 4096)
    assert reads(server) == []
    assert push(server, "invalidate") == 0
    assert holder.read("range", "memory", 0, 4096).result() == expected("memory", 0, 4096)
    assert reads(server) != []


def test_opening_keeps_the_cache(mount: Mount) -> None:
    """What one reader brought into the page cache serves the next, and so does the name."""
    holder = mount({"memory": SIZE})
    server = holder.serve(tell=["read", "taken"])
    assert holder.read("whole", "memory").result() == expected("memory", 0, SIZE)
    server.drain()
    assert holder.read("mapped", "memory").result() == expected("memory", 0, SIZE)
    taken = [event["opcode"] for event in server.drain() if event["event"] == "taken"]
    assert Opcode.READ not in taken
    assert Opcode.LOOKUP not in taken


def test_forgotten_name_is_looked_up_again(mount: Mount) -> None:
    """After an invalidation of its name the next use of a file asks the server."""
    holder = mount({"memory": SIZE})
    server = holder.serve(tell=["taken"])

    def lookups() -> int:
        holder.read("attempt(lambda: os.stat(path).st_size)", "memory").result()
        return [event.get("opcode") for event in server.drain()].count(Opcode.LOOKUP)

    assert [lookups(), lookups()] == [1, 0]
    assert push(server, "forget") == 0
    assert [lookups(), lookups()] == [1, 0]


def wait_blocked(server: ServerProcess, thread: int) -> None:
    """Wait until a thread of the server sleeps uninterruptibly in writev(2)."""
    task = Path(f"/proc/{server.pid}/task/{thread}")
    while True:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        call = (task / "syscall").read_text().split()[0]
        if (state, call) == ("D", WRITEV[os.uname().machine]):
            return


def test_push_waits_for_a_read_of_the_same_page(mount: Mount) -> None:
    """A push of a page that is being read waits for the answer, and does not hinder it."""
    holder = mount({"memory": SIZE})
    server = holder.serve(held=["memory"], tell=["held"])
    reader = holder.read("range", "memory", 0, 4096)
    server.expect("held")
    server.send("store", path="memory", offset=0, length=4096)
    wait_blocked(server, server.expect("pushing")["thread"])
    server.send("release")
    assert server.expect("pushed")["error"] == 0
    assert reader.result() == expected("memory", 0, 4096)


def test_server_killed_while_a_push_waits(mount_with_resend: Mount) -> None:
    """Such a server ends only when a successor has answered; its main thread ends at once.

    Who waits for the process before starting the successor waits for ever.
    """
    holder = mount_with_resend({"memory": SIZE})
    dying = holder.serve(held=["memory"], tell=["held"])
    reader = holder.read("range", "memory", 0, 4096)
    dying.expect("held")
    dying.send("store", path="memory", offset=0, length=4096)
    wait_blocked(dying, dying.expect("pushing")["thread"])
    dying.kill()
    dying.wait_dying()
    assert not dying.has_ended()
    holder.serve()
    assert reader.result() == expected("memory", 0, 4096)
    dying.wait()
