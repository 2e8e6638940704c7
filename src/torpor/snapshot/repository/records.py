"""Records: everything in a repository that is not window content (docs/format.md, "Record").

Each is a MessagePack map, compressed if that makes it smaller, sealed with the domain's key and
bound to its kind and to the name of its object. Leases and condemnations are never sealed: pushes
and collections of all domains in a bucket must understand them, and they say nothing secret.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import blake3
import msgspec
import zstandard

from torpor.errors import Damaged, DataError, Incompatible, InvalidInput, KeyMissing
from torpor.snapshot.repository.domain import KEY_ID_BYTES, PlainDomain
from torpor.snapshot.repository.filemap import EncodedMap
from torpor.snapshot.repository.keys import plain_keyring
from torpor.structs import prepared
from torpor.units import Digest

if TYPE_CHECKING:
    from torpor.snapshot.repository.domain import Domain
    from torpor.snapshot.repository.keys import Keyring

VERSION: Final = 1
HEADER_BYTES: Final = 16
_MAGIC: Final = b"TORPOR"
_LEVEL: Final = 3


class Kind(enum.IntEnum):
    """The kind byte of a record's header."""

    REF = 1
    MANIFEST = 2
    WAKE = 3
    IMAGE = 4
    INDEX = 5
    LEASE = 6
    CONDEMNED = 7


LIMITS: Final[dict[Kind, int]] = {
    Kind.REF: 64 * 1024,
    Kind.MANIFEST: 256 * 1024 * 1024,
    Kind.WAKE: 64 * 1024 * 1024,
    Kind.IMAGE: 256 * 1024 * 1024,
    Kind.INDEX: 16 * 1024 * 1024,
    Kind.LEASE: 4 * 1024,
    Kind.CONDEMNED: 64 * 1024 * 1024,
}
"""The longest body of each kind in bytes, before compression and after it."""

LARGEST_RATIO: Final = 64
"""How many times longer than its frame a compressed body may be."""

_OPEN_KINDS: Final = frozenset({Kind.LEASE, Kind.CONDEMNED})


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Link(_Record, frozen=True):
    """An object that a record vouches for: key, length, and BLAKE3 of its bytes."""

    key: str
    size_bytes: int
    hash: bytes


class WakeLink(_Record, frozen=True):
    """A wake object: key, whole length, and BLAKE3 of its header, which names every chunk in it.

    `header_bytes` is the length of the header's record; the chunks follow it.
    """

    key: str
    size_bytes: int
    header_bytes: int
    hash: bytes


class ImageLink(_Record, frozen=True):
    """An image or app of a snapshot: the digest and length of its file, and its record."""

    digest: Digest
    size_bytes: int
    record: Link


class RefRecord(_Record, frozen=True):
    """What a name points to. `name` is the ref's own, so that refs cannot be swapped.

    `outline` is the manifest without extents, as JSON, and `images` are those of its record: a VM
    is started by them while the record comes. Refs of earlier writers have neither.
    """

    name: str
    snapshot: Digest
    manifest: Link
    wake: WakeLink
    updated_ns: int
    outline: bytes = b""
    images: tuple[ImageLink, ...] = ()


class BaseLink(_Record, frozen=True):
    """The base that a snapshot descends from, as this repository holds it."""

    digest: Digest
    manifest: Link


class SnapshotRecord(_Record, frozen=True):
    """A snapshot: the node's manifest as it is, and where the content of each file lies.

    The maps are complete. `base` is there when the base was sent too; nothing of a restore needs
    it, writers of other functions do.
    """

    manifest: bytes
    memory: EncodedMap
    disk: EncodedMap
    wake: WakeLink
    images: tuple[ImageLink, ...]
    base: BaseLink | None


class SegmentRecord(_Record, frozen=True):
    """Some windows of a working set, sealed together: position in the object, length, BLAKE3.

    `file` is `memory`, `image` or `app`; `windows` are their numbers, 32 bits each, little-endian,
    in the order in which they are to be pushed. The content is that of the windows, one after the
    other, as a chunk is encoded; windows of zeros are in it.
    """

    file: str
    windows: bytes
    offset: int
    length: int
    hash: bytes


class WakeRecord(_Record, frozen=True):
    """The header of a wake object: file maps by name, all into the object's own data.

    Names are `vmstate`, always there, and `disk` for scratch windows that are repeated here. Every
    map has one pack, whose id is zeros: offset 0 is the first byte behind the header's record, in
    `working_set` too. That is in the order in which a woken function touches it; a reader that
    wants none of it leaves it out.
    """

    files: dict[str, EncodedMap]
    working_set: tuple[SegmentRecord, ...]


class ImageRecord(_Record, frozen=True):
    """An image or app: digest and kind of the file, and where its windows lie."""

    digest: Digest
    content: EncodedMap


class IndexRecord(_Record, frozen=True):
    """The chunks of one pack in their order: lengths 16 bits each, ids 32 bytes each."""

    pack: bytes
    lengths: bytes
    ids: bytes


class LeaseRecord(_Record, frozen=True):
    """A push under way, written again while it lasts."""

    purpose: str
    beats: int


class CondemnedRecord(_Record, frozen=True):
    """Objects that a collection is going to delete: no push may build on them any more.

    `leases` are those that were alive when this could first be read, None until that is known:
    only these pushes may not have seen it.
    """

    keys: tuple[str, ...]
    leases: tuple[str, ...] | None


_TYPES: Final[dict[Kind, type[_Record]]] = {
    Kind.REF: RefRecord,
    Kind.MANIFEST: SnapshotRecord,
    Kind.WAKE: WakeRecord,
    Kind.IMAGE: ImageRecord,
    Kind.INDEX: IndexRecord,
    Kind.LEASE: LeaseRecord,
    Kind.CONDEMNED: CondemnedRecord,
}
_KINDS: Final = {record: kind for kind, record in _TYPES.items()}

R = TypeVar("R", bound=_Record)


class Opened(NamedTuple):
    """A record's body and the domain whose key opened it."""

    domain: Domain
    body: bytes


def hash_bytes(data: bytes | memoryview) -> bytes:
    """BLAKE3 as links carry it."""
    return blake3.blake3(data).digest()


def seal(domain: Domain, name: str, record: _Record) -> bytes:
    """The bytes of a record that becomes the object `name`.

    Raises InvalidInput for one that is longer than its kind may be.
    """
    kind = _KINDS[type(record)]
    if kind in _OPEN_KINDS:
        domain = PlainDomain()
    body = msgspec.msgpack.encode(record)
    if len(body) > LIMITS[kind]:
        raise InvalidInput(
            f"{name} would be too long for the store's format",
            reason=f"{len(body)} bytes, at most {LIMITS[kind]}",
        )
    header = _MAGIC + bytes((kind, VERSION)) + domain.key_id
    return header + domain.seal_record(header, name, _pack(body))


def unseal(keyring: Keyring, name: str, data: bytes, as_type: type[R]) -> tuple[R, Domain]:
    """The record in the bytes of the object `name`, and the domain that it belongs to.

    Raises Damaged, Incompatible for a newer version, KeyMissing; each names the object.
    """
    kind = _KINDS[as_type]
    if kind in _OPEN_KINDS:
        keyring = plain_keyring()
    try:
        opened = _open(keyring, name, data, kind)
        body = _unpack(opened.body, LIMITS[kind])
        return msgspec.msgpack.decode(body, type=prepared(as_type)), opened.domain
    except (ValueError, RecursionError) as error:  # msgspec's, and its UnicodeDecodeError
        raise damaged(name, f"it is no record of its kind: {error}") from None
    except Damaged as error:
        raise damaged(name, str(error)) from None


def damaged(name: str, reason: str) -> Damaged:
    """The error for an object whose bytes are not what they should be."""
    return Damaged(
        f"object {name} in the store is damaged",
        reason=reason,
        hint="`torpor store check --read-data` lists what is; delete those objects, then push"
        " again from a node that has the snapshot",
    )


def check_link(link: Link | WakeLink, data: bytes) -> None:
    """Raise Damaged unless `data` is what the link vouches for; of a wake object, its header."""
    size = link.header_bytes if isinstance(link, WakeLink) else link.size_bytes
    if len(data) != size:
        raise damaged(link.key, f"it has {len(data)} bytes, what points to it says {size}")
    if hash_bytes(data) != link.hash:
        raise damaged(link.key, "its hash is another than the one that points to it says")


def within(name: str, error: DataError) -> DataError:
    """An error about a part of an object as one about the object, of the same class."""
    if isinstance(error, Damaged):
        return damaged(name, str(error))
    return type(error)(
        f"object {name} in the store cannot be read", reason=str(error), hint=error.hint
    )


def _open(keyring: Keyring, name: str, data: bytes, kind: Kind) -> Opened:
    header = data[:HEADER_BYTES]
    if len(header) < HEADER_BYTES or not header.startswith(_MAGIC):
        raise Damaged("it is no record of a torpor repository")
    found, version, key_id = header[6], header[7], header[8:]
    if version > VERSION:
        raise Incompatible(
            f"object {name} has format version {version}",
            reason=f"this torpor reads versions up to {VERSION}",
            hint="install a newer torpor on this node",
        )
    if version != VERSION or found != kind:
        raise Damaged(f"it says kind {found}, version {version}")
    domain = keyring.find(key_id)
    if domain is None and key_id == PlainDomain.key_id:
        raise KeyMissing(
            f"object {name} is not sealed",
            reason="whoever can write to the store could have put it there",
            hint="--plain reads it all the same",
        )
    if domain is None:
        raise KeyMissing(
            f"object {name} is sealed with key {key_id.hex()}",
            reason=f"this node has {' '.join(_key_names(keyring))}",
            hint="add that key to the keyring; `torpor key show` tells where it is",
        )
    return Opened(domain, domain.open_record(header, name, data[HEADER_BYTES:]))


def _key_names(keyring: Keyring) -> list[str]:
    named = [d.key_id.hex() for d in (keyring.current, *keyring.others) if not d.is_plain]
    return named or ["no key"]


def _pack(body: bytes) -> bytes:
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(body)
    smaller = len(packed) < len(body) <= LARGEST_RATIO * len(packed)
    return b"\x01" + packed if smaller else b"\x00" + body


def _unpack(packed: bytes, limit_bytes: int) -> bytes:
    """The body; nothing is allocated for a length that the data is too short for."""
    if packed[:1] == b"\x00":
        body = packed[1:]
        if len(body) > limit_bytes:
            raise Damaged(f"a body of {len(body)} bytes")
        return body
    if packed[:1] != b"\x01":
        raise Damaged("a body with an unknown encoding")
    frame = packed[1:]
    try:
        claimed = zstandard.frame_content_size(frame)
        if not 0 < claimed <= min(limit_bytes, LARGEST_RATIO * len(frame)):
            raise Damaged(f"a frame of {len(frame)} bytes that claims {claimed}")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Damaged(f"a body that cannot be decompressed: {error}") from None


assert len(_MAGIC) + 2 + KEY_ID_BYTES == HEADER_BYTES
