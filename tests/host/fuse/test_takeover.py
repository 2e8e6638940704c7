"""Servers die in the middle of reads; readers wait and get their bytes from the next one."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import TYPE_CHECKING

import pytest

from fixtures.fuse_server import expected
from torpor.host.fuse.connection import Connection
from torpor.units import MiB

if TYPE_CHECKING:
    from conftest import Mount
    from fixtures.fuse_server import Holder, Reader

pytestmark = [pytest.mark.host, pytest.mark.chaos]

READERS = 8
KILLS = 20
SIZE = 4 * MiB + 1234
FILES = {f"snapshots/{number}/memory{number}": SIZE for number in range(READERS)}
PLACES = ("taken", "answering", "answered")


def start_readers(holder: Holder) -> list[Reader]:
    """A reader for each file, by reading and by mapping."""
    return [holder.read("mapped" if n % 2 else "whole", path) for n, path in enumerate(FILES)]


def check_readers(readers: list[Reader]) -> None:
    """All of them end with the bytes of their file."""
    for number, reader in enumerate(readers):
        assert reader.result() == expected(f"memory{number}", 0, SIZE)


def test_same_reads_held_over_many_kills(mount_with_resend: Mount) -> None:
    """Reads that 20 servers took and died with are answered by the next one.

    Each successor starts before the dead one is known to have ended.
    """
    holder = mount_with_resend(FILES)
    held = [f"memory{number}" for number in range(READERS)]
    server = holder.serve(held=held, tell=["held"])
    readers = start_readers(holder)
    for kill in range(KILLS):
        for _ in range(READERS):
            server.expect("held")
        server.kill()
        server = holder.serve(held=held if kill < KILLS - 1 else [], tell=["held"])
    check_readers(readers)


def test_killed_at_each_named_place(mount_with_resend: Mount) -> None:
    """20 servers kill themselves before, at or after an answer; no reader sees more than delay."""
    holder = mount_with_resend(FILES)
    deaths = [[PLACES[kill % 3], 1 + kill % 5] for kill in range(KILLS)]
    server = holder.serve(die_at=deaths[0])
    readers = start_readers(holder)
    for death in deaths[1:]:
        server.wait_dying()
        server = holder.serve(die_at=death)
    server.wait_dying()
    holder.serve()
    for dead in holder.servers[:-1]:
        dead.wait()
    holder.connection.resend()
    check_readers(readers)


def test_request_taken_after_the_resend(mount_with_resend: Mount) -> None:
    """A dying server may take requests after the resend: the one after its end gets them back.

    Two servers serve at once; one is killed under load, and all readers go on each time.
    """
    holder = mount_with_resend(FILES)
    dying = holder.serve()
    readers = [holder.read("forever", path) for path in FILES]
    for _ in range(KILLS):
        successor = holder.serve()
        dying.kill()
        holder.connection.resend()
        dying.wait()
        holder.connection.resend()
        for reader in readers:
            for _ in range(3):
                assert reader.line() == "."
        dying = successor


def test_open_and_signal_without_a_server(mount_with_resend: Mount) -> None:
    """With no server alive: opening waits for one, killing and signalling readers takes effect."""
    holder = mount_with_resend({"one": SIZE, "two": SIZE, "three": SIZE})
    server = holder.serve(held=["one", "two"], tell=["held"])
    killed = holder.read("direct", "one", 0, 4096)
    signalled = holder.read("signalled", "two", 0, 4096)
    assert signalled.line() == "opened"
    server.expect("held")
    server.expect("held")
    server.kill()
    server.wait()
    opening = holder.read("whole", "three")
    killed.signal(signal.SIGKILL)
    signalled.signal(signal.SIGUSR1)
    holder.serve(held=["one", "two"], tell=["held", "interrupted"])
    assert opening.result() == expected("three", 0, SIZE)
    assert signalled.end() == (1, "interrupted by a signal\n")
    assert killed.end()[0] == -signal.SIGKILL


def test_other_descriptors_serve_too(mount_with_resend: Mount) -> None:
    """Duplicates of the descriptors, under other numbers, are the same connection."""
    holder = mount_with_resend({"memory": SIZE})
    server = holder.serve(held=["memory"], tell=["held"])
    reader = holder.read("whole", "memory")
    server.expect("held")
    server.kill()
    numbers = [os.dup(number) for number in holder.connection.descriptors]
    adopted = Connection.adopt(holder.connection.describe(), descriptors=numbers)
    assert adopted.negotiated == holder.connection.negotiated
    holder.connection.close()
    holder.connection = adopted
    holder.serve()
    assert reader.result() == expected("memory", 0, SIZE)


def test_clone_that_nobody_holds(mount_with_resend: Mount) -> None:
    """What a dead server took on a clone that its holder did not keep is lost to the reader.

    This is the kernel's rule, and why a holder keeps every descriptor.
    """
    holder = mount_with_resend({"memory": SIZE}, descriptors=2)
    first, clone = holder.connection.descriptors
    server = holder.serve(held=["memory"], tell=["held"], only_descriptor=1)
    reader = holder.read("direct", "memory", 0, 4096)
    server.expect("held")
    os.close(clone)
    holder.connection = dataclasses.replace(holder.connection, descriptors=(first,))
    server.kill()
    assert "ECONNABORTED" in reader.end()[1] or "abort" in reader.end()[1]


def test_readers_without_any_server_are_freed_by_unmounting(mount: Mount) -> None:
    """What to do where requests cannot be sent again: readers end with an error, not never."""
    holder = mount({"memory": SIZE})
    server = holder.serve(held=["memory"], tell=["held"])
    reader = holder.read("whole", "memory")
    server.expect("held")
    server.kill()
    server.wait()
    holder.unmount()
    assert reader.end()[0] != 0
