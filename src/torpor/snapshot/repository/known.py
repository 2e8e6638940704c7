"""What a repository holds already, as a push may build on it."""

from __future__ import annotations

import array
import functools
import sys
from typing import TYPE_CHECKING, Final

from torpor.errors import Damaged, Incompatible, KeyMissing, ObjectMissing
from torpor.host.threads import map_ordered
from torpor.snapshot.repository.chunks import ID_BYTES, LONGEST_BYTES
from torpor.snapshot.repository.filemap import Location
from torpor.snapshot.repository.packing import PACK_HEADER
from torpor.snapshot.repository.records import LIMITS, IndexRecord, Kind, unseal
from torpor.snapshot.repository.repository import index_key, pack_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.snapshot.repository.filemap import FileMap
    from torpor.snapshot.repository.repository import Repository

_PARALLEL: Final = 8


class Known:
    """Packs and chunks that are there and not condemned. Made after the push's lease was written.

    What is asked for first costs requests: packs one listing, chunks one object a pack.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.condemned = repository.condemned_keys()

    @functools.cached_property
    def packs(self) -> dict[bytes, int]:
        """Lengths of the packs that may be used, by id."""
        return {
            bytes.fromhex(info.key.removeprefix("packs/")): info.size_bytes
            for info in self._repository.store.list("packs/")
            if info.key not in self.condemned and _is_pack(info.key)
        }

    @functools.cached_property
    def chunks(self) -> dict[bytes, Location]:
        """Where each chunk of the current domain lies, by id: some 250 bytes of memory each."""
        keys = [index_key(pack) for pack in list(self.packs)]
        found: dict[bytes, Location] = {}
        for part in map_ordered(self._read, keys, workers=_PARALLEL, ahead=4 * _PARALLEL):
            found.update(part)
        return found

    def arrived(self, key: str, size_bytes: int) -> None:
        """Count a pack that the push itself has sent; any thread."""
        if _is_pack(key):
            self.packs[bytes.fromhex(key.removeprefix("packs/"))] = size_bytes

    def has_all(self, *maps: FileMap) -> bool:
        """Whether every pack of the maps is there."""
        return all(
            self.packs.get(pack, 0) >= end
            for file in maps
            for pack, end in file.pack_ends().items()
        )

    def _read(self, key: str) -> dict[bytes, Location]:
        """A pack's chunks; nothing of an index that is missing, unsound, newer, or not ours."""
        try:
            data, _ = self._repository.store.get(key, limit_bytes=LIMITS[Kind.INDEX] + 1024)
            record, domain = unseal(self._repository.keyring, key, data, IndexRecord)
            ours = domain.key_id == self._repository.domain.key_id
            if not ours or index_key(record.pack) != key:
                return {}
            return dict(locate(record, self.packs[record.pack]))
        except (ObjectMissing, Damaged, Incompatible, KeyMissing):
            return {}


def locate(record: IndexRecord, pack_bytes: int) -> Iterator[tuple[bytes, Location]]:
    """The chunks of a pack of `pack_bytes` with their places. Raises Damaged."""
    lengths = decode_lengths(record.lengths)
    if len(record.ids) != len(lengths) * ID_BYTES:
        raise Damaged("its ids and lengths do not fit")
    if len(PACK_HEADER) + sum(lengths) != pack_bytes:
        raise Damaged(f"it describes another pack than one of {pack_bytes} bytes")
    if not lengths or min(lengths) == 0 or max(lengths) > LONGEST_BYTES:
        raise Damaged("it has a chunk length that cannot be, or none")
    place = len(PACK_HEADER)
    for index, length in enumerate(lengths):
        start = index * ID_BYTES
        yield record.ids[start : start + ID_BYTES], Location(record.pack, place, length)
        place += length


def decode_lengths(encoded: bytes) -> array.array[int]:
    """16-bit little-endian lengths. Raises Damaged for half a one."""
    if len(encoded) % 2:
        raise Damaged("half a length")
    lengths = array.array("H", encoded)
    if sys.byteorder == "big":
        lengths.byteswap()
    return lengths


def _is_pack(key: str) -> bool:
    digits = key.removeprefix("packs/")
    return (
        len(digits) == 32
        and set(digits) <= set("0123456789abcdef")
        and key == pack_key(bytes.fromhex(digits))
    )
