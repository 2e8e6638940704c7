"""A repository in one tar file: what `snapshot export` writes and `snapshot import` reads.

docs/format.md, "Archive", is the format: a POSIX ustar file whose first member is a marker with the
format's version and whose others are the objects of a repository, in the order of writing. Members
are never extracted: an object is a range of the file.
"""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from typing import TYPE_CHECKING, Final

from torpor.errors import (
    Damaged,
    Incompatible,
    InvalidInput,
    ObjectConflict,
    ObjectMissing,
    StoreDenied,
    StoreError,
)
from torpor.store.interface import (
    Condition,
    Etag,
    ObjectInfo,
    Store,
    check_key,
    check_prefix,
    check_range,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MARKER: Final = "torpor-archive"
VERSION: Final = 1

_BLOCK: Final = tarfile.BLOCKSIZE
_RECORD: Final = tarfile.RECORDSIZE
_LARGEST_MEMBER_BYTES: Final = 8 * 1024**3 - 1
"""The longest that a ustar header can say."""
_MARKER_LIMIT: Final = 64
_LONGEST_END_BYTES: Final = 1024 * 1024
"""Other tar programs fill the last record with zeros, and some make large ones."""
_LEASES: Final = "leases/"


class ArchiveWriter(Store):
    """A store that a push writes into once: it appends, and reads nothing back.

    `write` takes all bytes of the file in order. Leases are not written: nobody else is at the
    file. Of refs, those that do not exist yet can be written. `finish` ends the file.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._leases: set[str] = set()
        self._written_bytes = 0
        self._append(MARKER, f"{VERSION}\n".encode())

    def finish(self) -> int:
        """Write the end of the archive; the length of the whole."""
        self._emit(bytes(2 * _BLOCK))
        self._emit(bytes(-self._written_bytes % _RECORD))
        return self._written_bytes

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store. No object but a lease is ever replaced: that raises ObjectConflict."""
        check_key(key)
        with self._lock:
            if key.startswith(_LEASES):
                self._leases.add(key)
                return _etag(key, len(data))
            if isinstance(condition, Etag) or key in self._sizes:
                raise ObjectConflict(f"object {key} of the archive cannot be replaced")
            self._append(key, data)
            self._sizes[key] = len(data)
        return _etag(key, len(data))

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store. The object is held in memory: a tar header comes first and has its length."""
        self.put(key, b"".join(parts))

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store. Raises StoreError for what was written to the file."""
        raise self._unreadable(key)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See Store. Raises StoreError for what was written to the file."""
        raise self._unreadable(key)

    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """See Store. Raises StoreError for what was written to the file."""
        raise self._unreadable(key)

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return _info(self._sizes, check_key(key), "the archive")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        check_prefix(prefix)
        with self._lock:
            keys = sorted(key for key in self._sizes if key.startswith(prefix))
        return (self.head(key) for key in keys)

    def delete(self, key: str) -> None:
        """See Store. Raises StoreDenied for what was written to the file."""
        if check_key(key) in self._sizes:
            raise StoreDenied(f"object {key} cannot be deleted from an archive")
        with self._lock:
            self._leases.discard(key)

    def delete_many(self, keys: Iterable[str]) -> None:
        """See Store. Raises StoreDenied for what was written to the file."""
        for key in keys:
            self.delete(key)

    def delete_leftovers(self, *, older_than_s: float) -> int:
        """See Store. There are none."""
        return 0

    def _unreadable(self, key: str) -> StoreError:
        self.head(key)
        return StoreError(f"object {key} is in an archive that is still being written")

    def _append(self, key: str, data: bytes) -> None:
        if len(data) > _LARGEST_MEMBER_BYTES:
            raise InvalidInput(f"object {key} is too large for an archive")
        header = tarfile.TarInfo(key)
        header.size, header.mode = len(data), 0o600
        for part in (header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)):
            self._emit(part)

    def _emit(self, data: bytes) -> None:
        self._write(data)
        self._written_bytes += len(data)


class ArchiveReader(Store):
    """The objects of an archive, read only, as ranges of an open regular file.

    Every header is checked when it is opened: kind, name, and that the member lies within the file
    as it really is. Raises Damaged naming the file, Incompatible for a newer version.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._places: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._scan()

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store. Always raises StoreDenied."""
        raise self._denied(key)

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store. Always raises StoreDenied."""
        raise self._denied(key)

    def delete(self, key: str) -> None:
        """See Store. Always raises StoreDenied."""
        raise self._denied(key)

    def delete_many(self, keys: Iterable[str]) -> None:
        """See Store. Raises StoreDenied for the first of them."""
        for key in keys:
            self.delete(key)

    def delete_leftovers(self, *, older_than_s: float) -> int:
        """See Store. There are none."""
        return 0

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        info = self.head(key)
        if info.size_bytes > limit_bytes:
            raise Damaged(
                f"object {key} is too large",
                reason=f"{info.size_bytes} bytes, at most {limit_bytes}",
            )
        return self.get_range(key, 0, info.size_bytes), info.etag

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See Store."""
        check_range(offset, length)
        size = self.head(key).size_bytes
        if offset + length > size:
            raise Damaged(f"object {key} is too short", reason=f"it has {size} bytes")
        return self._read(self._places[key] + offset, length)

    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """See Store."""
        check_range(0, length - 1)
        info = self.head(key)
        return self.get_range(key, 0, min(length, info.size_bytes)), info

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        return _info(self._sizes, check_key(key), self._name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        check_prefix(prefix)
        return (self.head(key) for key in sorted(self._sizes) if key.startswith(prefix))

    # the file

    def _scan(self) -> None:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{self._name} is not a regular file")
        place, end = 0, status.st_size
        while (header := self._header(place, end)) is not None:
            place += _BLOCK
            if header.size > end - place:
                raise self._damaged(f"it ends within {header.name!r}")
            if place == _BLOCK:
                self._check_marker(header, place)
            elif header.name in self._sizes:
                raise self._damaged(f"{header.name!r} is in it twice")
            else:
                self._places[header.name] = place
                self._sizes[header.name] = header.size
            place += header.size + -header.size % _BLOCK
        self._check_end(place, end)

    def _header(self, place: int, end: int) -> tarfile.TarInfo | None:
        if place + _BLOCK > end:
            raise self._damaged("its end is missing" if place else "it is too short")
        block = self._read(place, _BLOCK)
        if place and not any(block):
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            check_key(header.name)
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError):
            raise self._foreign(place) from None
        except InvalidInput as error:
            raise self._damaged(error.message) from None
        if header.type != tarfile.REGTYPE or header.linkname or header.size < 0:
            raise self._damaged(f"{header.name!r} is not a plain file")
        return header

    def _check_marker(self, header: tarfile.TarInfo, place: int) -> None:
        if header.name != MARKER or header.size > _MARKER_LIMIT:
            raise self._foreign(0)
        try:
            version = int(self._read(place, header.size))
        except ValueError:
            raise self._damaged("its version is not a number") from None
        if version > VERSION:
            raise Incompatible(
                f"{self._name} has archive version {version}",
                reason=f"this torpor reads versions up to {VERSION}",
                hint="install a newer torpor on this node",
            )
        if version != VERSION:
            raise self._damaged(f"its version is {version}")

    def _check_end(self, place: int, end: int) -> None:
        if not 2 * _BLOCK <= end - place <= _LONGEST_END_BYTES:
            raise self._damaged(f"{end - place} bytes are behind its last object")
        if any(self._read(place, end - place)):
            raise self._damaged("something is behind its end")

    def _read(self, place: int, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = os.pread(self._descriptor, length - len(data), place + len(data))
            if not part:
                raise self._damaged("it became shorter while it was read")
            data += part
        return bytes(data)

    def _damaged(self, reason: str) -> Damaged:
        return damaged_archive(self._name, reason)

    def _foreign(self, place: int) -> Damaged:
        if place == 0:
            return self._damaged("it is not an archive that `torpor snapshot export` wrote")
        return self._damaged(f"at byte {place} there is no header of an object")

    def _denied(self, key: str) -> StoreDenied:
        return StoreDenied(f"object {key} cannot be written", reason=f"{self._name} is read only")


def damaged_archive(name: str, reason: str) -> Damaged:
    """The error for an archive that is not what an export wrote."""
    return Damaged(
        f"archive {name} is damaged",
        reason=reason,
        hint="copy it again, or export the snapshot again",
    )


def _info(sizes: dict[str, int], key: str, where: str) -> ObjectInfo:
    size = sizes.get(key)
    if size is None:
        raise ObjectMissing(f"there is no object {key} in {where}")
    return ObjectInfo(key, size, _etag(key, size), 0.0)


def _etag(key: str, size_bytes: int) -> str:
    return f"{key}-{size_bytes}"
