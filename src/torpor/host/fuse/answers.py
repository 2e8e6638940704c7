"""Answers and notices to bytes. No IO, no threads.

A message is a list of buffers for writev(2), since the device takes one message a write.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING, Final

from torpor.errors import InternalError
from torpor.host.fuse import layouts
from torpor.host.fuse.layouts import NotifyCode, OpenFlag
from torpor.host.fuse.protocol import MAX_READ_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.host.fuse.files import Buffer, Node
    from torpor.host.fuse.protocol import Read

FILE_OPEN_FLAGS: Final = OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH
DIRECTORY_OPEN_FLAGS: Final = OpenFlag(0)

_FOREVER_S: Final = 1 << 30  # names and attributes are forgotten by notice only
_BLOCK_BYTES: Final = 512
_DOT, _DOTDOT = 1, 2  # their places in a directory; entries stand at their ids, above both


def encode_answer(unique: int, data: Sequence[Buffer] = ()) -> list[Buffer]:
    """A good answer. `unique` must be the request's whole id, the resend bit too."""
    length = layouts.OUT_HEADER.size + sum(map(len, data))
    return [layouts.OUT_HEADER.struct.pack(length, 0, unique), *data]


def encode_error(unique: int, number: int) -> list[Buffer]:
    """A refusal with an errno between 1 and 511; any other number becomes EIO."""
    number = number if 0 < number < 512 else errno.EIO
    return [layouts.OUT_HEADER.struct.pack(layouts.OUT_HEADER.size, -number, unique)]


def _attributes(node: Node) -> dict[str, int]:
    mode = stat.S_IFDIR | 0o700 if node.is_directory else stat.S_IFREG | 0o444
    return {
        "ino": node.id,
        "size": node.size_bytes,
        "blocks": -(-node.size_bytes // _BLOCK_BYTES),
        **dict.fromkeys(("atime", "mtime", "ctime"), node.changed_s),
        "mode": mode,
        "nlink": 2 if node.is_directory else 1,
        "blksize": PAGE_BYTES,
    }


def _nested(prefix: str, values: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}.{field}": value for field, value in values.items()}


def _entry(node: Node) -> dict[str, int]:
    return {
        "nodeid": node.id,
        "entry_valid": _FOREVER_S,
        "attr_valid": _FOREVER_S,
        **_nested("attr", _attributes(node)),
    }


def encode_entry(node: Node) -> bytes:
    """The arguments of a LOOKUP's answer; the name is good until it is invalidated."""
    return layouts.ENTRY_OUT.pack(**_entry(node))


def encode_attributes(node: Node) -> bytes:
    """The arguments of a GETATTR's answer. Files are 0600, directories 0700, all of them root's."""
    return layouts.ATTR_OUT.pack(attr_valid=_FOREVER_S, **_nested("attr", _attributes(node)))


def encode_open(flags: OpenFlag) -> bytes:
    """The arguments of an OPEN's or OPENDIR's answer. There are no file handles: they are 0."""
    return layouts.OPEN_OUT.pack(open_flags=flags)


def encode_statfs(size_bytes: int, files: int) -> bytes:
    """The arguments of a STATFS's answer: a full file system of this size."""
    return layouts.STATFS_OUT.pack(
        blocks=-(-size_bytes // PAGE_BYTES),
        files=files,
        bsize=PAGE_BYTES,
        frsize=PAGE_BYTES,
        namelen=255,
    )


def encode_directory(
    directory: Node, entries: Sequence[Node], request: Read, *, plus: bool
) -> bytes:
    """Directory entries after `request.offset`, as many as fit `request.size`, none at the end.

    Entries are ordered by id and an entry's offset is its id, so a listing goes on where it was
    when files come or go meanwhile, and in another server.
    """
    encode = _encode_direntplus if plus else _encode_dirent
    dots = [(_DOT, ".", directory), (_DOTDOT, "..", directory)]
    named = [(node.id, node.name, node) for node in sorted(entries, key=lambda node: node.id)]
    out = b""
    for place, name, node in dots + named:
        if place <= request.offset:
            continue
        record = encode(node, name.encode(), place)
        if len(out) + len(record) > request.size:
            break
        out += record
    return out


def _dirent(node: Node, name: bytes, place: int) -> dict[str, int]:
    mode = stat.S_IFDIR if node.is_directory else stat.S_IFREG
    return {"ino": node.id, "off": place, "namelen": len(name), "type": mode >> 12}


def _aligned(record: bytes) -> bytes:
    return record + bytes(-len(record) % 8)


def _encode_dirent(node: Node, name: bytes, place: int) -> bytes:
    return _aligned(layouts.DIRENT.pack(**_dirent(node, name, place)) + name)


def _encode_direntplus(node: Node, name: bytes, place: int) -> bytes:
    entry = {} if place in (_DOT, _DOTDOT) else _entry(node)  # node id 0: the dots are no lookups
    fields = {**_nested("entry_out", entry), **_nested("dirent", _dirent(node, name, place))}
    return _aligned(layouts.DIRENTPLUS.pack(**fields) + name)


def _notice(code: NotifyCode, fields: bytes = b"", data: Sequence[Buffer] = ()) -> list[Buffer]:
    length = layouts.OUT_HEADER.size + len(fields) + sum(map(len, data))
    return [layouts.OUT_HEADER.struct.pack(length, code, 0) + fields, *data]


def encode_store(node: Node, offset: int, data: Sequence[Buffer]) -> list[Buffer]:
    """NOTIFY_STORE: whole pages, or pages up to the end of the file, for the page cache.

    Raises InternalError for anything else: the kernel would lengthen the file, or drop the pages.
    """
    size = sum(map(len, data))
    end = offset + size
    whole = end % PAGE_BYTES == 0 or end == node.size_bytes
    if offset % PAGE_BYTES or not whole or end > node.size_bytes or not 0 < size <= MAX_READ_BYTES:
        raise InternalError(
            f"{size} bytes at {offset} cannot be stored",
            reason=f"not 1 to 256 whole pages of a file of {node.size_bytes} bytes",
        )
    fields = layouts.NOTIFY_STORE_OUT.pack(nodeid=node.id, offset=offset, size=size)
    return _notice(NotifyCode.STORE, fields, data)


def encode_invalidate_inode(node: Node, offset: int = 0, length: int = 0) -> list[Buffer]:
    """NOTIFY_INVAL_INODE: drop attributes and pages of a range; length 0 is to the end."""
    fields = layouts.NOTIFY_INVAL_INODE_OUT.pack(ino=node.id, off=offset, len=length)
    return _notice(NotifyCode.INVAL_INODE, fields)


def encode_invalidate_entry(parent: int, name: str) -> list[Buffer]:
    """NOTIFY_INVAL_ENTRY: forget a name of a directory, given by its id."""
    encoded = name.encode()
    fields = layouts.NOTIFY_INVAL_ENTRY_OUT.pack(parent=parent, namelen=len(encoded))
    return _notice(NotifyCode.INVAL_ENTRY, fields, [encoded + b"\0"])


def encode_resend() -> list[Buffer]:
    """NOTIFY_RESEND: put every request that was taken and not answered back into the queue."""
    return _notice(NotifyCode.RESEND)
