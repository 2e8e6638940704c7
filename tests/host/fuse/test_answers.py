"""What programs see of a mount that a server process answers for."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.fuse_server import expected
from torpor.host.fuse import protocol
from torpor.host.fuse.connection import Connection, find_device, probe, unmount
from torpor.host.fuse.layouts import InitFlag, Opcode
from torpor.host.process import run
from torpor.units import MiB

if TYPE_CHECKING:
    from conftest import Mount

pytestmark = pytest.mark.host

SIZE = 5 * MiB + 1234


def test_names(mount: Mount) -> None:
    """`ls`, `stat` and `df` see the files, their sizes and modes; more entries than one READDIR."""
    names = [f"file-{number:04}-{'x' * 100}" for number in range(500)]
    holder = mount({"a/b/memory": SIZE, **{f"many/{name}": 1 for name in names}})
    holder.serve()
    top = str(holder.mount_point)
    assert run(["ls", "-A", f"{top}/many"], timeout_s=30).split() == names
    assert run(["ls", "-f", f"{top}/a/b"], timeout_s=30).split() == [".", "..", "memory"]
    listing = run(["find", top, "-name", "memory", "-printf", "%P %s %m %y %U"], timeout_s=30)
    assert listing == f"a/b/memory {SIZE} 444 f 0"
    assert run(["stat", "-c", "%F %a", f"{top}/a"], timeout_s=30) == "directory 700\n"
    blocks = -(-(SIZE + 500) // 4096)
    found = run(["stat", "-f", "-c", "%b %f %c %S", top], timeout_s=30).split()
    assert found == [str(blocks), "0", "504", "4096"]


def test_bytes(mount: Mount) -> None:
    """Whole reads, odd blocks, direct reads, ranges and private mappings give the file's bytes."""
    holder = mount({"a/memory": SIZE})
    holder.serve()
    whole = expected("memory", 0, SIZE)
    path = holder.mount_point / "a" / "memory"
    for command in (["cat", path], ["dd", f"if={path}", "bs=12345", "status=none"]):
        words = ["sh", "-c", '"$@" | sha256sum', "sh", *command]
        assert run(words, timeout_s=30).split()[0] == whole
    assert holder.read("mapped", "a/memory").result() == whole
    assert holder.read("range", "a/memory", SIZE - 50, 4096).result() == expected(
        "memory", SIZE - 50, 50
    )
    assert holder.read("direct", "a/memory", MiB, 1 * MiB).result() == expected("memory", MiB, MiB)


def test_reads_are_of_one_mebibyte(mount: Mount) -> None:
    """A sequential reader's pages are asked for in pieces of 1 MiB."""
    holder = mount({"memory": 8 * MiB})
    server = holder.serve(tell=["read"])
    assert holder.read("whole", "memory").result() == expected("memory", 0, 8 * MiB)
    reads = [event for event in server.drain() if event["event"] == "read"]
    assert sum(event["length"] for event in reads) == 8 * MiB
    assert max(event["length"] for event in reads) == MiB


def test_readers_at_once(mount: Mount) -> None:
    """Eight readers on two files and two worker threads all get their bytes."""
    holder = mount({"one": SIZE, "two": SIZE}, descriptors=2)
    holder.serve(workers=2)
    names = ["one", "two"] * 4
    readers = [holder.read("mapped" if n % 3 else "whole", name) for n, name in enumerate(names)]
    for name, reader in zip(names, readers, strict=True):
        assert reader.result() == expected(name, 0, SIZE)


def test_what_need_not_wait_is_answered_by_one_thread(mount: Mount) -> None:
    """Readers at once make no second worker run, until a read waits: another takes its seat."""
    holder = mount({"held": SIZE, "one": SIZE, "two": SIZE})
    server = holder.serve(held=["held"], tell=["read", "held"], workers=4)

    def threads() -> set[int]:
        readers = [holder.read("whole", name) for name in ("one", "two") * 2]
        for name, reader in zip(("one", "two") * 2, readers, strict=True):
            assert reader.result() == expected(name, 0, SIZE)
        server.send("invalidate", path="one")
        server.expect("pushed")
        return {event["thread"] for event in server.drain() if event["event"] == "read"}

    (first,) = threads()
    held = holder.read("direct", "held", 0, 4096)
    assert server.expect("held")["thread"] == first
    (second,) = threads()
    assert second != first
    server.send("release")
    assert held.result() == expected("held", 0, 4096)


WRITES = {
    "os.pwrite(os.open(path, os.O_RDWR), b'x', 5)": "EROFS",
    "os.truncate(path, 0)": "EROFS",
    "os.chmod(path, 0o777)": "EROFS",
    "os.utime(path)": "EROFS",
    "os.unlink(path)": "EROFS",
    "os.rename(path, path + '2')": "EROFS",
    "os.link(path, path + '2')": "EROFS",
    "os.symlink('a', path + '2')": "EROFS",
    "os.mkdir(path + '2')": "EROFS",
    "os.open(path + '2', os.O_CREAT | os.O_WRONLY)": "EROFS",
    "os.setxattr(path, 'user.a', b'')": "EROFS",
}
OTHERS = {
    "os.getxattr(path, 'user.a')": "ENOTSUP",
    "os.fsync(os.open(path, os.O_RDWR))": "None",
    "os.lseek(os.open(path, os.O_RDONLY), 5, os.SEEK_DATA)": "5",
    "os.access(path, os.R_OK | os.W_OK)": "True",
    "os.close(os.open(path, os.O_RDWR))": "None",
    "os.open(path + '2', os.O_RDONLY)": "ENOENT",
    "os.open(path.encode() + b'\\xff', os.O_RDONLY)": "ENOENT",
}


def test_calls_beside_reading(mount: Mount) -> None:
    """The file opens for writing; what would change it is EROFS, what is unknown is ENOSYS."""
    holder = mount({"memory": SIZE})
    server = holder.serve(tell=["taken"])
    cases = {**WRITES, **OTHERS}
    code = "".join(f"attempt(lambda: {call})\n" for call in cases)
    assert holder.read(code, "memory").result().split() == list(cases.values())
    taken = {event["opcode"] for event in server.drain() if event["event"] == "taken"}
    assert {Opcode.WRITE, Opcode.SETATTR, Opcode.GETXATTR, Opcode.LSEEK} <= taken
    for program in ("range", "direct"):
        assert holder.read(program, "memory", 0, 4096).result() == expected("memory", 0, 4096)


def test_closing_asks_nobody(mount: Mount) -> None:
    """Closing a file that was opened for writing sends no FLUSH, so it needs no living server."""
    holder = mount({"memory": SIZE})
    server = holder.serve(tell=["taken"])
    assert holder.read("mapped", "memory").result() == expected("memory", 0, SIZE)
    taken = [event["opcode"] for event in server.drain() if event["event"] == "taken"]
    assert Opcode.OPEN in taken
    assert Opcode.FLUSH not in taken


@pytest.mark.parametrize(("fault", "seen"), [(13, "EACCES"), (0, "EIO"), (-1, "EIO")])
def test_handler_that_fails(mount: Mount, fault: int, seen: str) -> None:
    """Its OSError reaches the reader; a mistake (0) or short data (-1) is EIO, never zeros."""
    holder = mount({"bad": SIZE, "good": SIZE})
    holder.serve(errors={"bad": fault})
    code = "attempt(lambda: os.preadv(os.open(path, os.O_RDONLY | os.O_DIRECT), [memory], 0))"
    code = f"memory = mmap.mmap(-1, 8192)\n{code}\nassert memory[:] == bytes(8192)"
    assert holder.read(code, "bad").result() == seen
    assert holder.read("whole", "good").result() == expected("good", 0, SIZE)


def test_signal_interrupts_a_held_read(mount: Mount) -> None:
    """A signal to a waiting reader reaches the handler, whose EINTR lets the reader go on."""
    holder = mount({"memory": SIZE})
    server = holder.serve(held=["memory"], tell=["held", "interrupted"])
    reader = holder.read("signalled", "memory", 0, 4096)
    assert reader.line() == "opened"
    server.expect("held")
    reader.signal(signal.SIGUSR1)
    server.expect("interrupted")
    assert reader.end() == (1, "interrupted by a signal\n")


def test_killed_reader_ends(mount: Mount) -> None:
    """A reader killed in a held read ends while the read is held; others are served."""
    holder = mount({"held": SIZE, "free": SIZE})
    server = holder.serve(held=["held"], tell=["held"])
    mapped, direct = holder.read("mapped", "held"), holder.read("direct", "held", 0, 4096)
    server.expect("held")
    server.expect("held")
    for reader in (mapped, direct):
        reader.signal(signal.SIGKILL)
    for reader in (mapped, direct):
        assert reader.end()[0] == -signal.SIGKILL
    assert holder.read("whole", "free").result() == expected("free", 0, SIZE)


def test_unmount_while_reading(mount: Mount) -> None:
    """Unmounting frees waiting readers with an error and ends the workers."""
    holder = mount({"memory": SIZE})
    server = holder.serve(held=["memory"], tell=["held"])
    readers = [holder.read(program, "memory", 0, 4096) for program in ("whole", "mapped", "direct")]
    server.expect("held")
    server.expect("held")
    unmount(holder.mount_point)
    assert find_device(holder.mount_point) is None
    server.send("release")
    server.expect("unmounted")
    assert [reader.end()[0] != 0 for reader in readers] == [True] * 3
    assert os.listdir(holder.mount_point) == []
    unmount(holder.mount_point)


def test_mount_that_fails(tmp_path: Path) -> None:
    """A mount at a place that is none leaves no descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        Connection.mount(tmp_path / "missing")
    assert set(os.listdir("/proc/self/fd")) == before


def test_mount_whose_negotiation_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure after the mount leaves neither mount nor descriptor."""
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(protocol, "negotiate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Connection.mount(tmp_path)
    assert find_device(tmp_path) is None
    assert set(os.listdir("/proc/self/fd")) == before


def test_probe_leaves_nothing() -> None:
    """The kernel's abilities are learnt without a trace; 1 MiB reads are among them."""
    descriptors = set(os.listdir("/proc/self/fd"))
    mounts = Path("/proc/self/mountinfo").read_text()
    negotiated = probe()
    assert InitFlag.MAX_PAGES in negotiated.flags
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_mount_point_with_odd_letters(tmp_path: Path) -> None:
    """A mount is found and ended at a path that mountinfo has to escape."""
    odd = tmp_path / "a b\\ü\tc"
    odd.mkdir()
    connection = Connection.mount(odd)
    assert find_device(odd) is not None
    connection.unmount()
    assert find_device(odd) is None
