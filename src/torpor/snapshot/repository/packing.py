"""Writing chunks: packs that are sent as they fill, each followed by its index."""

from __future__ import annotations

import array
import collections
import sys
from typing import TYPE_CHECKING, Final

from torpor.host.threads import submit
from torpor.snapshot.repository.filemap import Location
from torpor.snapshot.repository.records import IndexRecord, seal
from torpor.snapshot.repository.repository import index_key, new_id, pack_key

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

    from torpor.snapshot.repository.repository import Repository

PACK_BYTES: Final = 8 * 1024 * 1024
PACK_HEADER: Final = b"TORPOR-PACK-0001"
_UPLOADS: Final = 3


class PackWriter:
    """Collects sealed chunks in order and sends a pack whenever `pack_bytes` are together.

    Belongs to one thread. `sent` is called from others, with an object's key and length, when it
    has arrived. Holds at most `_UPLOADS` full packs and the one that fills.
    """

    def __init__(
        self,
        repository: Repository,
        pool: concurrent.futures.ThreadPoolExecutor,
        *,
        sent: Callable[[str, int], None],
        pack_bytes: int = PACK_BYTES,
    ) -> None:
        self._repository = repository
        self._pool = pool
        self._sent = sent
        self._pack_bytes = pack_bytes
        self._uploads: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self._begin()

    def add(self, chunk_id: bytes, sealed: bytes) -> Location:
        """Take a chunk; where it is going to lie. Raises what sending an earlier pack raised."""
        location = Location(self._pack, len(self._data), len(sealed))
        self._data += sealed
        self._ids.append(chunk_id)
        self._lengths.append(len(sealed))
        if len(self._data) >= self._pack_bytes:
            self._send()
        return location

    def flush(self) -> None:
        """Begin to send what is left."""
        if self._ids:
            self._send()

    def finish(self) -> None:
        """Send what is left and wait until everything has arrived."""
        self.flush()
        while self._uploads:
            self._uploads.popleft().result()

    def _begin(self) -> None:
        self._pack = new_id()
        self._data = bytearray(PACK_HEADER)
        self._ids: list[bytes] = []
        self._lengths = array.array("H")

    def _send(self) -> None:
        pack, data = self._pack, bytes(self._data)
        if sys.byteorder == "big":
            self._lengths.byteswap()
        index = IndexRecord(pack=pack, lengths=self._lengths.tobytes(), ids=b"".join(self._ids))
        self._begin()
        while len(self._uploads) >= _UPLOADS:
            self._uploads.popleft().result()
        upload = submit(self._pool, lambda: self._upload(pack, data, index))
        self._uploads.append(upload)

    def _upload(self, pack: bytes, data: bytes, index: IndexRecord) -> None:
        store, domain = self._repository.store, self._repository.domain
        store.put(pack_key(pack), data)
        self._sent(pack_key(pack), len(data))
        encoded = seal(domain, index_key(pack), index)
        store.put(index_key(pack), encoded)
        self._sent(index_key(pack), len(encoded))
