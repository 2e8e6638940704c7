"""Any bytes in place of the kernel's: decoded, or refused as damaged."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from torpor.errors import Damaged
from torpor.host.fuse import answers, layouts, protocol
from torpor.host.fuse.files import Tree
from torpor.host.fuse.layouts import Opcode

opcodes = st.sampled_from(Opcode) | st.integers(0, 2**32 - 1)
ids = st.integers(0, 2**64 - 1)


def decode(data: bytes) -> protocol.Body | None:
    """What a server sees of a message; None when it is refused."""
    try:
        return protocol.decode_body(protocol.decode_header(data), data)
    except Damaged:
        return None


@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Bytes are a request or Damaged, nothing else."""
    decode(data)


@given(opcode=opcodes, unique=ids, node=ids, arguments=st.binary(max_size=200))
@example(opcode=Opcode.BATCH_FORGET, unique=2, node=0, arguments=b"\xff" * 24)
@example(opcode=Opcode.INIT, unique=2, node=0, arguments=b"\xff" * 64)
def test_any_arguments(opcode: int, unique: int, node: int, arguments: bytes) -> None:
    """With a sound header any arguments are a request or Damaged; the header is as sent."""
    length = layouts.IN_HEADER.size + len(arguments)
    head = layouts.IN_HEADER.pack(len=length, opcode=opcode, unique=unique, nodeid=node)
    assert protocol.decode_header(head + arguments) == (length, opcode, unique, node)
    body = decode(head + arguments)
    match body:
        case protocol.Forget(nodes):
            assert len(nodes) * 16 <= max(16, len(arguments))
        case protocol.Lookup(name):
            assert name
            assert b"\0" not in name
        case protocol.Init():
            agreed = body.major == 7 and body.minor >= 31
            if agreed:
                _, answer = protocol.negotiate(body, max_readahead=1 << 20, max_background=9)
                assert len(answer) == layouts.INIT_OUT.size


names = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=60
).filter(lambda name: name not in (".", ".."))


@given(
    files=st.sets(names, max_size=30),
    size=st.integers(512, 4096),
    gone=st.integers(0, 10),
    plus=st.booleans(),
)
def test_any_directory(files: set[str], size: int, gone: int, plus: bool) -> None:
    """A listing in pieces has each entry once, also when entries go while it is read."""
    tree = Tree()
    for name in files:
        tree.add([name], size_bytes=1)
    root = tree.node(1)
    seen: list[int] = []
    offset, head = 0, layouts.DIRENTPLUS if plus else layouts.DIRENT
    skip = head.size - layouts.DIRENT.size
    removed = set(sorted(files)[:gone])
    while True:
        request = protocol.Read(offset, size)
        data = answers.encode_directory(root, tree.entries(root), request, plus=plus)
        if not data:
            break
        while data:
            node, offset, length, _ = layouts.DIRENT.struct.unpack_from(data, skip)
            seen.append(node)
            data = data[-(-(head.size + length) // 8) * 8 :]
        for name in removed & {node.name for node in tree.entries(root)}:
            tree.remove([name])
    entries = seen[2:]
    assert len(entries) == len(set(entries))
    assert {node.id for node in tree.entries(root)} <= set(entries)
