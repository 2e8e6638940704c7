"""The structures, opcodes and flags of linux/fuse.h, protocol 7.40, by their names there.

Source: include/uapi/linux/fuse.h of Linux 6.9. Fields are in the host's byte order and stand at
their natural offsets, padding is written out. A test compares sizes, offsets and values with the
header that is installed.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT_ID: Final = 1
DEVICE_CLONE: Final = 0x8004E500  # FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t)
MIN_READ_BUFFER: Final = 8192
UNIQUE_INTERRUPT: Final = 1  # an INTERRUPT's own id is its request's with this bit
UNIQUE_RESEND: Final = 1 << 63  # FUSE_UNIQUE_RESEND: the id of a request that was sent again


class Opcode(enum.IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


class InitFlag(enum.IntFlag):
    """FUSE_...: flags of INIT; bits 32 to 63 travel in `flags2`."""

    ASYNC_READ = 1 << 0
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


class OpenFlag(enum.IntFlag):
    """FOPEN_...: what an open file's answer asks of the kernel."""

    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5


class NotifyCode(enum.IntEnum):
    """enum fuse_notify_code."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RESEND = 7


class Layout:
    """One structure: `FIELDS` is `name:code` pairs, a code as in the struct module.

    `size` is in bytes, `offsets` maps each field to its place.
    """

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        pairs = [field.split(":") for field in fields.split()]
        self._empty = {field: b"" if code.endswith("s") else 0 for field, code in pairs}
        self.struct = struct.Struct("=" + "".join(code for _, code in pairs))
        self.size = self.struct.size
        self.offsets: Mapping[str, int] = {
            field: struct.calcsize("=" + "".join(code for _, code in pairs[:index]))
            for index, (field, _) in enumerate(pairs)
        }

    def pack(self, **values: int | bytes) -> bytes:
        """The structure with fields by name, zero where not given. Raises KeyError."""
        for field in values:
            self._empty[field]  # a misspelt field is not a zero
        return self.struct.pack(*({**self._empty, **values}.values()))


_ATTR = (
    "ino:Q size:Q blocks:Q atime:Q mtime:Q ctime:Q atimensec:I mtimensec:I ctimensec:I "
    "mode:I nlink:I uid:I gid:I rdev:I blksize:I flags:I"
)
_NESTED_ATTR = " ".join(f"attr.{field}" for field in _ATTR.split())
_ENTRY = (
    f"nodeid:Q generation:Q entry_valid:Q attr_valid:Q entry_valid_nsec:I attr_valid_nsec:I "
    f"{_NESTED_ATTR}"
)
_DIRENT = "ino:Q off:Q namelen:I type:I"

IN_HEADER: Final = Layout(
    "fuse_in_header",
    "len:I opcode:I unique:Q nodeid:Q uid:I gid:I pid:I total_extlen:H padding:H",
)
OUT_HEADER: Final = Layout("fuse_out_header", "len:I error:i unique:Q")
INIT_IN: Final = Layout(
    "fuse_init_in", "major:I minor:I max_readahead:I flags:I flags2:I unused:44s"
)
INIT_OUT: Final = Layout(
    "fuse_init_out",
    "major:I minor:I max_readahead:I flags:I max_background:H congestion_threshold:H "
    "max_write:I time_gran:I max_pages:H map_alignment:H flags2:I unused:28s",
)
ENTRY_OUT: Final = Layout("fuse_entry_out", _ENTRY)
ATTR_OUT: Final = Layout("fuse_attr_out", f"attr_valid:Q attr_valid_nsec:I dummy:I {_NESTED_ATTR}")
GETATTR_IN: Final = Layout("fuse_getattr_in", "getattr_flags:I dummy:I fh:Q")
FORGET_IN: Final = Layout("fuse_forget_in", "nlookup:Q")
FORGET_ONE: Final = Layout("fuse_forget_one", "nodeid:Q nlookup:Q")
BATCH_FORGET_IN: Final = Layout("fuse_batch_forget_in", "count:I dummy:I")
OPEN_IN: Final = Layout("fuse_open_in", "flags:I open_flags:I")
OPEN_OUT: Final = Layout("fuse_open_out", "fh:Q open_flags:I padding:I")
READ_IN: Final = Layout(
    "fuse_read_in", "fh:Q offset:Q size:I read_flags:I lock_owner:Q flags:I padding:I"
)
RELEASE_IN: Final = Layout("fuse_release_in", "fh:Q flags:I release_flags:I lock_owner:Q")
ACCESS_IN: Final = Layout("fuse_access_in", "mask:I padding:I")
INTERRUPT_IN: Final = Layout("fuse_interrupt_in", "unique:Q")
STATFS_OUT: Final = Layout(
    "fuse_kstatfs",
    "blocks:Q bfree:Q bavail:Q files:Q ffree:Q bsize:I namelen:I frsize:I padding:I spare:24s",
)
DIRENT: Final = Layout("fuse_dirent", _DIRENT)
DIRENTPLUS: Final = Layout(
    "fuse_direntplus",
    " ".join(f"entry_out.{field}" for field in _ENTRY.split())
    + " "
    + " ".join(f"dirent.{field}" for field in _DIRENT.split()),
)
NOTIFY_STORE_OUT: Final = Layout("fuse_notify_store_out", "nodeid:Q offset:Q size:I padding:I")
NOTIFY_INVAL_INODE_OUT: Final = Layout("fuse_notify_inval_inode_out", "ino:Q off:q len:q")
NOTIFY_INVAL_ENTRY_OUT: Final = Layout("fuse_notify_inval_entry_out", "parent:Q namelen:I flags:I")

LAYOUTS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Layout))
