"""Requests to objects, answers to bytes: by example."""

from __future__ import annotations

import errno
import struct

import pytest

from torpor.errors import Damaged, HostUnfit, InternalError
from torpor.host.fuse import answers, layouts, protocol
from torpor.host.fuse.files import Node, Tree
from torpor.host.fuse.layouts import InitFlag, Opcode

FILE = Node(1 << 62 | 5, ("a", "memory"), is_directory=False, size_bytes=3 * 4096 + 100)
ROOT = Node(1, (), is_directory=True)
OFFER = (1 << 64) - 1


def message(opcode: int, arguments: bytes = b"", *, node: int = 7, unique: int = 42) -> bytes:
    """A request as the kernel sends it."""
    header = layouts.IN_HEADER.pack(
        len=layouts.IN_HEADER.size + len(arguments), opcode=opcode, unique=unique, nodeid=node
    )
    return header + arguments


def decode(data: bytes) -> protocol.Body:
    """Header and arguments."""
    return protocol.decode_body(protocol.decode_header(data), data)


def init_in(**values: int) -> bytes:
    """The arguments of an INIT from a new kernel that offers everything."""
    offer = {"major": 7, "minor": 45, "max_readahead": 131072, "flags": OFFER & 0xFFFFFFFF}
    return layouts.INIT_IN.pack(**{**offer, "flags2": OFFER >> 32, **values})


def test_each_request() -> None:
    """Requests give their fields; unknown opcodes give Plain."""
    read = layouts.READ_IN.pack(offset=1 << 40, size=1 << 20)
    batch = layouts.BATCH_FORGET_IN.pack(count=2) + struct.pack("=4Q", 5, 1, 6, 3)
    cases = {
        message(Opcode.LOOKUP, b"memory\0"): protocol.Lookup(b"memory"),
        message(Opcode.READ, read): protocol.Read(1 << 40, 1 << 20),
        message(Opcode.READDIRPLUS, read): protocol.Read(1 << 40, 1 << 20),
        message(Opcode.FORGET, layouts.FORGET_IN.pack(nlookup=3)): protocol.Forget(((7, 3),)),
        message(Opcode.BATCH_FORGET, batch): protocol.Forget(((5, 1), (6, 3))),
        message(Opcode.OPEN, layouts.OPEN_IN.pack(flags=2)): protocol.Open(2),
        message(Opcode.ACCESS, layouts.ACCESS_IN.pack(mask=4)): protocol.Access(4),
        message(Opcode.INTERRUPT, layouts.INTERRUPT_IN.pack(unique=8)): protocol.Interrupt(8),
        message(Opcode.GETATTR, layouts.GETATTR_IN.pack()): protocol.Plain(),
        message(Opcode.RELEASE, layouts.RELEASE_IN.pack()): protocol.Plain(),
        message(Opcode.STATFS): protocol.Plain(),
        message(4711, b"anything"): protocol.Plain(),
    }
    for data, body in cases.items():
        assert decode(data) == body


@pytest.mark.parametrize(
    ("opcode", "arguments", "says"),
    [
        (Opcode.READ, bytes(39), "expected 40"),
        (Opcode.READ, bytes(41), "expected 40"),
        (Opcode.GETATTR, b"", "expected 16"),
        (Opcode.STATFS, b"\0", "expected none"),
        (Opcode.LOOKUP, b"", "ends with a zero byte"),
        (Opcode.LOOKUP, b"\0", "ends with a zero byte"),
        (Opcode.LOOKUP, b"memory", "ends with a zero byte"),
        (Opcode.LOOKUP, b"mem\0ory\0", "ends with a zero byte"),
        (Opcode.BATCH_FORGET, bytes(7), "at least 8"),
        (Opcode.BATCH_FORGET, struct.pack("=II", 0xFFFFFFFF, 0), "4294967295 nodes"),
        (Opcode.INIT, bytes(20), "expected 16 or 64"),
    ],
)
def test_wrong_lengths(opcode: Opcode, arguments: bytes, says: str) -> None:
    """A truncated or over-long request is refused with its name, what came and what should."""
    with pytest.raises(Damaged, match=says) as caught:
        decode(message(opcode, arguments))
    assert opcode.name in caught.value.message
    assert f"{len(arguments)} bytes" in caught.value.message


def test_length_in_the_header() -> None:
    """A message shorter than a header, or of another length than its header says, is refused."""
    with pytest.raises(Damaged, match="shorter than its header"):
        protocol.decode_header(bytes(39))
    for data in (message(Opcode.STATFS) + b"\0", message(Opcode.READ, bytes(40))[:-1]):
        with pytest.raises(Damaged, match="its header says"):
            protocol.decode_header(data)


def negotiate(data: bytes) -> tuple[protocol.Negotiated, bytes]:
    """Decode an INIT and agree."""
    body = decode(message(Opcode.INIT, data))
    assert isinstance(body, protocol.Init)
    return protocol.negotiate(body, max_readahead=1 << 20, max_background=128)


def test_negotiation_with_a_new_kernel() -> None:
    """Only what is wanted is taken: 1 MiB reads, resend, no automatic invalidation."""
    agreed, answer = negotiate(init_in())
    assert agreed.has_resend
    assert agreed.minor == 40
    assert agreed.max_readahead == 131072
    assert InitFlag.AUTO_INVAL_DATA not in agreed.flags
    assert InitFlag.EXPLICIT_INVAL_DATA in agreed.flags
    fields = layouts.INIT_OUT.struct.unpack(answer)
    values = dict(zip(layouts.INIT_OUT.offsets, fields, strict=True))
    assert values["flags"] | values["flags2"] << 32 == agreed.flags == protocol.WANTED
    assert (values["max_pages"], values["max_write"], values["major"]) == (256, 4096, 7)


def test_negotiation_with_an_older_kernel() -> None:
    """Without FUSE_INIT_EXT the upper flags do not count, and there is no resend."""
    low = 0xFFFFFFFF & ~InitFlag.INIT_EXT
    for data in (init_in(flags=low, minor=35), init_in(flags=low, minor=35)[:16]):
        agreed, _ = negotiate(data)
        assert agreed.minor == 35
        assert not agreed.has_resend
    agreed, _ = negotiate(init_in(flags2=0))
    assert not agreed.has_resend


@pytest.mark.parametrize(("major", "minor"), [(7, 30), (6, 99), (8, 0)])
def test_negotiation_that_fails(major: int, minor: int) -> None:
    """A kernel of another major version or before 7.31 is refused with both versions."""
    with pytest.raises(HostUnfit, match=rf"{major}\.{minor} .*7\.31"):
        negotiate(init_in(major=major, minor=minor))


def test_answer_keeps_the_whole_id() -> None:
    """An answer carries the request's id with the bit that says it was sent again."""
    unique = layouts.UNIQUE_RESEND | 42
    good = b"".join(answers.encode_answer(unique, [b"ab", b"c"]))
    assert layouts.OUT_HEADER.struct.unpack_from(good) == (19, 0, unique)
    assert good[16:] == b"abc"
    (refusal,) = answers.encode_error(unique, errno.EROFS)
    assert layouts.OUT_HEADER.struct.unpack(bytes(refusal)) == (16, -errno.EROFS, unique)


@pytest.mark.parametrize("number", [0, -1, 512, 1 << 40])
def test_errno_that_the_kernel_would_not_take(number: int) -> None:
    """An errno out of range becomes EIO: the kernel would leave the reader waiting."""
    (refusal,) = answers.encode_error(2, number)
    assert layouts.OUT_HEADER.struct.unpack(bytes(refusal))[1] == -errno.EIO


def test_attributes() -> None:
    """Files are 0444, directories 0700; size and blocks are the file's."""
    offsets = layouts.ATTR_OUT.offsets
    file, root = answers.encode_attributes(FILE), answers.encode_attributes(ROOT)
    assert struct.unpack_from("=I", file, offsets["attr.mode"]) == (0o100444,)
    assert struct.unpack_from("=I", root, offsets["attr.mode"]) == (0o040700,)
    assert struct.unpack_from("=Q", file, offsets["attr.size"]) == (3 * 4096 + 100,)
    assert struct.unpack_from("=Q", file, offsets["attr.blocks"]) == (25,)


def read_directory(nodes: list[Node], size: int, *, plus: bool) -> list[str]:
    """All names, fetched in pieces of `size` bytes as the kernel would."""
    names, offset = [], 0
    head = layouts.DIRENTPLUS if plus else layouts.DIRENT
    skip = head.size - layouts.DIRENT.size
    while True:
        data = answers.encode_directory(ROOT, nodes, protocol.Read(offset, size), plus=plus)
        assert len(data) <= size
        if not data:
            return names
        while data:
            _, offset, length, _ = layouts.DIRENT.struct.unpack_from(data, skip)
            names.append(data[head.size : head.size + length].decode())
            data = data[-(-(head.size + length) // 8) * 8 :]


@pytest.mark.parametrize("plus", [False, True])
def test_directory_in_pieces(plus: bool) -> None:
    """Whatever the size of the pieces, each entry is there once, and so are the dots."""
    tree = Tree()
    for number in range(40):
        tree.add([f"file{number}" + "x" * number], size_bytes=1)
    nodes = list(tree.entries(tree.node(1)))
    for size in (256, 1000, 65536):
        names = read_directory(nodes, size, plus=plus)
        assert names[:2] == [".", ".."]
        assert sorted(names[2:]) == sorted(node.name for node in nodes)


def test_store() -> None:
    """A store is one message: which node, where, how much, then the pages."""
    header, *data = answers.encode_store(FILE, 4096, [bytes(4096), bytes(4096)])
    assert layouts.OUT_HEADER.struct.unpack_from(header) == (16 + 24 + 8192, 4, 0)
    assert layouts.NOTIFY_STORE_OUT.struct.unpack_from(header, 16) == (FILE.id, 4096, 8192, 0)
    assert sum(map(len, data)) == 8192


@pytest.mark.parametrize(
    ("offset", "length"), [(1, 4096), (0, 100), (0, 0), (3 * 4096, 4096), (4 * 4096, 4096)]
)
def test_store_that_the_kernel_would_misread(offset: int, length: int) -> None:
    """Parts of pages and bytes beyond the end are refused; the file's last bytes are not."""
    with pytest.raises(InternalError, match="cannot be stored"):
        answers.encode_store(FILE, offset, [bytes(length)])
    assert answers.encode_store(FILE, 3 * 4096, [bytes(100)])


def test_notices() -> None:
    """Invalidation and resend have the kernel's codes and lengths."""
    inode = b"".join(answers.encode_invalidate_inode(FILE, 4096, 8192))
    assert layouts.OUT_HEADER.struct.unpack_from(inode) == (40, 2, 0)
    assert struct.unpack_from("=Qqq", inode, 16) == (FILE.id, 4096, 8192)
    entry = b"".join(answers.encode_invalidate_entry(1, "memory"))
    assert layouts.OUT_HEADER.struct.unpack_from(entry) == (39, 3, 0)
    assert struct.unpack_from("=QII", entry, 16) == (1, 6, 0)
    assert entry[32:] == b"memory\0"
    assert b"".join(answers.encode_resend()) == struct.pack("=IiQ", 16, 7, 0)
