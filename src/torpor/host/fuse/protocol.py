"""Bytes of /dev/fuse to requests, and what is agreed on at INIT. No IO, no threads.

Every length that the kernel gives is checked; what does not fit raises Damaged. The other way, from
answers and notices to bytes, is `answers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from torpor.errors import Damaged, HostUnfit
from torpor.host.fuse import layouts
from torpor.host.fuse.layouts import InitFlag, Opcode
from torpor.units import MiB

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.host.fuse.files import Buffer

MAJOR: Final = 7
MINOR: Final = 40
OLDEST_MINOR: Final = 31
PAGE_BYTES: Final = 4096
MAX_READ_BYTES: Final = MiB
MAX_WRITE_BYTES: Final = PAGE_BYTES  # the kernel's least: every write is refused
REQUEST_BYTES: Final = 4 * PAGE_BYTES
"""A buffer for any request: no less than a WRITE of MAX_WRITE_BYTES or a LOOKUP takes."""

WANTED: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.INIT_EXT
    | InitFlag.HAS_RESEND
)

WRITING: Final = frozenset(
    {
        Opcode.SETATTR,
        Opcode.SYMLINK,
        Opcode.MKNOD,
        Opcode.MKDIR,
        Opcode.UNLINK,
        Opcode.RMDIR,
        Opcode.RENAME,
        Opcode.RENAME2,
        Opcode.LINK,
        Opcode.WRITE,
        Opcode.CREATE,
        Opcode.TMPFILE,
        Opcode.FALLOCATE,
        Opcode.SETXATTR,
        Opcode.REMOVEXATTR,
    }
)
"""Requests that would change something: EROFS. FLUSH, FSYNC and all others not here: ENOSYS."""

SILENT: Final = frozenset(
    {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY}
)
"""Requests that take no answer."""


class Header(NamedTuple):
    """fuse_in_header, as far as a server needs it."""

    length: int
    opcode: int
    unique: int
    node: int


@dataclass(frozen=True)
class Init:
    """INIT: what the kernel offers."""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


@dataclass(frozen=True)
class Lookup:
    """LOOKUP of a name in the directory that the header names."""

    name: bytes


@dataclass(frozen=True)
class Forget:
    """FORGET or BATCH_FORGET: (node id, number of lookups) pairs."""

    nodes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Open:
    """OPEN or OPENDIR; `flags` as of open(2)."""

    flags: int


@dataclass(frozen=True)
class Read:
    """READ of a file, or READDIR and READDIRPLUS with an opaque offset."""

    offset: int
    size: int


@dataclass(frozen=True)
class Access:
    """ACCESS; `mask` as of access(2)."""

    mask: int


@dataclass(frozen=True)
class Interrupt:
    """INTERRUPT of the request with this id."""

    unique: int


@dataclass(frozen=True)
class Plain:
    """A request whose arguments do not matter here, or that is not known."""


Body = Init | Lookup | Forget | Open | Read | Access | Interrupt | Plain


@dataclass(frozen=True)
class Negotiated:
    """What kernel and server agreed on at INIT; valid for the connection's life."""

    minor: int
    flags: InitFlag
    max_readahead: int

    @property
    def has_resend(self) -> bool:
        """Whether requests that a dead server took can be had again (Linux 6.9)."""
        return InitFlag.HAS_RESEND in self.flags


def decode_header(data: Buffer) -> Header:
    """The header of one whole message from the device. Raises Damaged."""
    if len(data) < layouts.IN_HEADER.size:
        raise Damaged(f"a FUSE request of {len(data)} bytes", reason="shorter than its header")
    length, opcode, unique, node, *_ = layouts.IN_HEADER.struct.unpack_from(data)
    if length != len(data):
        raise Damaged(
            f"a FUSE request of {len(data)} bytes",
            reason=f"its header says {length}, opcode {opcode}",
        )
    return Header(length, opcode, unique, node)


def decode_body(header: Header, data: Buffer) -> Body:
    """The arguments of the message whose header was decoded. Raises Damaged.

    What it returns keeps nothing of `data`.
    """
    decode = _DECODERS.get(header.opcode)
    if decode is None:
        return Plain()
    arguments = memoryview(data)[layouts.IN_HEADER.size :]
    try:
        return decode(header, arguments)
    finally:
        arguments.release()


def _misfit(header: Header, found: int, expected: str) -> Damaged:
    return Damaged(
        f"a FUSE request {_name(header.opcode)} with {found} bytes of arguments",
        reason=f"expected {expected}",
    )


def _name(opcode: int) -> str:
    try:
        return Opcode(opcode).name
    except ValueError:
        return f"number {opcode}"


def _fields(layout: layouts.Layout, header: Header, arguments: memoryview) -> tuple[int, ...]:
    if len(arguments) != layout.size:
        raise _misfit(header, len(arguments), f"{layout.size}")
    return layout.struct.unpack(arguments)


def _decode_init(header: Header, arguments: memoryview) -> Init:
    old_size = layouts.INIT_IN.offsets["flags2"]
    if len(arguments) not in (old_size, layouts.INIT_IN.size):
        raise _misfit(header, len(arguments), f"{old_size} or {layouts.INIT_IN.size}")
    padded = bytes(arguments).ljust(layouts.INIT_IN.size, b"\0")
    major, minor, max_readahead, low, high, _ = layouts.INIT_IN.struct.unpack(padded)
    flags = low | high << 32 if low & InitFlag.INIT_EXT else low
    return Init(major, minor, max_readahead, InitFlag(flags))


def _decode_lookup(header: Header, arguments: memoryview) -> Lookup:
    name = bytes(arguments)
    if name.find(b"\0") != len(name) - 1 or len(name) < 2:
        raise _misfit(header, len(name), "one name that ends with a zero byte")
    return Lookup(name[:-1])


def _decode_forget(header: Header, arguments: memoryview) -> Forget:
    (lookups,) = _fields(layouts.FORGET_IN, header, arguments)
    return Forget(((header.node, lookups),))


def _decode_batch_forget(header: Header, arguments: memoryview) -> Forget:
    first, one = layouts.BATCH_FORGET_IN, layouts.FORGET_ONE
    if len(arguments) < first.size:
        raise _misfit(header, len(arguments), f"at least {first.size}")
    count, _ = first.struct.unpack_from(arguments)
    if len(arguments) != first.size + count * one.size:
        raise _misfit(header, len(arguments), f"{count} nodes of {one.size}")
    return Forget(tuple(one.struct.iter_unpack(arguments[first.size :])))


def _decode_open(header: Header, arguments: memoryview) -> Open:
    flags, _ = _fields(layouts.OPEN_IN, header, arguments)
    return Open(flags)


def _decode_read(header: Header, arguments: memoryview) -> Read:
    _, offset, size, *_ = _fields(layouts.READ_IN, header, arguments)
    return Read(offset, size)


def _decode_access(header: Header, arguments: memoryview) -> Access:
    mask, _ = _fields(layouts.ACCESS_IN, header, arguments)
    return Access(mask)


def _decode_interrupt(header: Header, arguments: memoryview) -> Interrupt:
    (unique,) = _fields(layouts.INTERRUPT_IN, header, arguments)
    return Interrupt(unique)


def _decode_nothing(header: Header, arguments: memoryview) -> Plain:
    if arguments:
        raise _misfit(header, len(arguments), "none")
    return Plain()


def _decode_sized(layout: layouts.Layout) -> Callable[[Header, memoryview], Plain]:
    def decode(header: Header, arguments: memoryview) -> Plain:
        _fields(layout, header, arguments)
        return Plain()

    return decode


_DECODERS: Final[dict[int, Callable[[Header, memoryview], Body]]] = {
    Opcode.INIT: _decode_init,
    Opcode.LOOKUP: _decode_lookup,
    Opcode.FORGET: _decode_forget,
    Opcode.BATCH_FORGET: _decode_batch_forget,
    Opcode.GETATTR: _decode_sized(layouts.GETATTR_IN),
    Opcode.OPEN: _decode_open,
    Opcode.OPENDIR: _decode_open,
    Opcode.READ: _decode_read,
    Opcode.READDIR: _decode_read,
    Opcode.READDIRPLUS: _decode_read,
    Opcode.RELEASE: _decode_sized(layouts.RELEASE_IN),
    Opcode.RELEASEDIR: _decode_sized(layouts.RELEASE_IN),
    Opcode.STATFS: _decode_nothing,
    Opcode.DESTROY: _decode_nothing,
    Opcode.ACCESS: _decode_access,
    Opcode.INTERRUPT: _decode_interrupt,
}


def negotiate(offer: Init, *, max_readahead: int, max_background: int) -> tuple[Negotiated, bytes]:
    """Agree to an INIT: what holds from now on, and the arguments of the answer.

    Of the kernel's flags those in WANTED are taken. Raises HostUnfit for a kernel older than 7.31.
    """
    if offer.major != MAJOR or offer.minor < OLDEST_MINOR:
        raise HostUnfit(
            f"this kernel speaks version {offer.major}.{offer.minor} of FUSE",
            reason=f"version {MAJOR}.{OLDEST_MINOR} or a later {MAJOR}.x is needed",
            hint="use Linux 5.4 or later",
        )
    flags = offer.flags & WANTED
    agreed = Negotiated(min(offer.minor, MINOR), flags, min(offer.max_readahead, max_readahead))
    return agreed, layouts.INIT_OUT.pack(
        major=MAJOR,
        minor=agreed.minor,
        max_readahead=agreed.max_readahead,
        flags=flags & 0xFFFFFFFF,
        flags2=flags >> 32,
        max_background=max_background,
        congestion_threshold=max_background * 3 // 4,
        max_write=MAX_WRITE_BYTES,
        time_gran=1,
        max_pages=MAX_READ_BYTES // PAGE_BYTES,
    )
