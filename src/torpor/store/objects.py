"""A Store over obstore, with its exceptions translated; no retries of its own."""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore import exceptions as obs

from torpor.errors import (
    Conflict,
    Damaged,
    InvalidInput,
    ObjectConflict,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
)
from torpor.host.cancel import checkpoint
from torpor.host.lock import exclusive
from torpor.store.interface import (
    Absent,
    Condition,
    Etag,
    ObjectInfo,
    Store,
    check_key,
    check_prefix,
    check_range,
    is_key,
)
from torpor.store.translate import read_words, translate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PART_BYTES: Final = 8 * 1024 * 1024
"""A stream's parts are cut and gathered to this size; a store keeps at most 10,000 of them."""

_PARTS_AT_ONCE: Final = 2
_TOKEN: Final = "torpor-upload"
_DELETE_AT_ONCE: Final = 1000
_LOCK: Final = ".lock"
_STAGED: Final = re.compile(r".+#\d+")
"""The name of a file that obstore writes and renames when it is whole."""

_LOCK_WAIT_S: Final = 30.0


class PlainStore(Store):
    """obstore as it is.

    `where` names the store in messages. `streams` is the same store for put_stream, one that
    keeps metadata, with obstore's own repeats of single parts. `directory` is a file store's:
    its own conditional puts know no etag, so a lock there makes those of all processes of this
    host exclude each other. `bulk`: the store deletes many objects in one request.
    """

    def __init__(
        self,
        store: Any,  # noqa: ANN401
        where: str,
        *,
        streams: Any = None,  # noqa: ANN401
        directory: Path | None = None,
        bulk: bool = False,
    ) -> None:
        self._store = store
        self._streams = streams or store
        self._where = where
        self._directory = directory
        self._bulk = bulk

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        check_key(key)
        checkpoint()
        if isinstance(condition, Etag) and self._directory is not None:
            return self._put_locked(key, data, condition, self._directory / _LOCK)
        mode: Any = "overwrite"
        if isinstance(condition, Absent):
            mode = "create"
        elif isinstance(condition, Etag):
            mode = {"e_tag": condition.value}
        return self._put(key, data, mode)

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        check_key(key)
        source, token = _Source(parts), secrets.token_hex(16)
        try:
            with self._translated(key):
                self._upload(key, source, token)
        except BaseException:
            if source.error is not None:
                raise source.error from None
            raise

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        check_key(key)
        checkpoint()
        with self._translated(key):
            result = obstore.get(self._store, key)
            info = _info(result.meta)
            if info.size_bytes > limit_bytes:
                raise Damaged(
                    f"object {key} is too large",
                    reason=f"{info.size_bytes} bytes, at most {limit_bytes}",
                )
            return self._whole(key, bytes(result.bytes()), info.size_bytes), info.etag

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See Store."""
        check_key(key)
        check_range(offset, length)
        if length == 0:
            return b""
        found = self._read(key, offset, length)
        size = found[1].size_bytes if found else self.head(key).size_bytes
        if found is None or size < offset + length:
            raise Damaged(
                f"object {key} is too short",
                reason=f"it has {size} bytes, wanted {length} from {offset}",
            )
        return self._whole(key, found[0], length)

    def get_prefix(self, key: str, length: int) -> tuple[bytes, ObjectInfo]:
        """See Store."""
        check_key(key)
        if length < 1:
            raise InvalidInput(f"not the length of a prefix: {length}")
        found = self._read(key, 0, length)
        if found is None:
            return self._whole(key, b"", (info := self.head(key)).size_bytes), info
        data, info = found
        return self._whole(key, data, min(length, info.size_bytes)), info

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        check_key(key)
        checkpoint()
        with self._translated(key):
            return _info(obstore.head(self._store, key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        check_prefix(prefix)
        found = []
        with self._translated(prefix):
            for batch in obstore.list(self._store, prefix.rstrip("/") or None):
                checkpoint()
                found += [_info(meta) for meta in batch if is_key(meta["path"])]
        return iter(sorted(found, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        """See Store."""
        check_key(key)
        checkpoint()
        with contextlib.suppress(ObjectMissing), self._translated(key):
            obstore.delete(self._store, key)

    def delete_many(self, keys: Iterable[str]) -> None:
        """See Store."""
        checked = iter([check_key(key) for key in keys])
        if not self._bulk:
            for key in checked:
                self.delete(key)
            return
        while some := [*itertools.islice(checked, _DELETE_AT_ONCE)]:
            checkpoint()
            with self._translated(f"{len(some)} objects"):
                obstore.delete(self._store, some)

    def delete_leftovers(self, *, older_than_s: float) -> int:
        """See Store."""
        if self._directory is None:
            return 0
        count = 0
        with self._translated("leftovers"):
            for path in self._directory.rglob("*"):
                checkpoint()
                if _STAGED.fullmatch(path.name) and _is_older(path, older_than_s):
                    path.unlink(missing_ok=True)
                    count += 1
        return count

    def _put(self, key: str, data: bytes, mode: Any) -> str:  # noqa: ANN401
        with self._translated(key):
            result = obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            return str(result["e_tag"] or "")

    def _upload(self, key: str, source: _Source, token: str) -> None:
        marked: Any = {_TOKEN: token} if self._streams is not self._store else None
        try:
            obstore.put(
                self._streams,
                key,
                source.pieces(),
                attributes=marked,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        except (obs.BaseError, OSError):
            # perhaps only the last answer was lost; completing again is then "no such upload"
            if not (marked and source.is_used_up and self._token_of(key) == token):
                raise

    def _token_of(self, key: str) -> str:
        """The token of the upload that made the object; nothing if it cannot be told."""
        try:
            found = obstore.get(self._streams, key, options={"head": True})
        except (obs.BaseError, OSError):
            return ""
        return str(found.attributes.get(_TOKEN, ""))

    def _put_locked(self, key: str, data: bytes, condition: Etag, lock: Path) -> str:
        with self._locked(lock, key):
            try:
                now = self.head(key).etag
            except ObjectMissing:
                now = ""
            if now != condition.value:
                raise ObjectConflict(f"object {key} was written by somebody else")
            return self._put(key, data, "overwrite")

    @contextlib.contextmanager
    def _locked(self, lock: Path, key: str) -> Iterator[None]:
        held = exclusive(lock, timeout_s=_LOCK_WAIT_S, what="the store")
        with contextlib.ExitStack() as stack:
            try:
                with self._translated(key):
                    stack.enter_context(held)
            except Conflict as busy:
                raise StoreUnreachable(f"{self._where} is busy", reason=str(busy)) from None
            yield

    def _read(self, key: str, offset: int, length: int) -> tuple[bytes, ObjectInfo] | None:
        """What there is of a range, None if the object ends at or before its begin."""
        checkpoint()
        with self._translated(key):
            try:
                wanted: Any = {"range": (offset, offset + length)}
                result = obstore.get(self._store, key, options=wanted)
            except obs.GenericError as error:
                words = read_words(str(error))
                if words.is_bad_range:
                    return None
                raise
            return bytes(result.bytes()), _info(result.meta)

    def _whole(self, key: str, data: bytes, length: int) -> bytes:
        if len(data) != length:
            raise StoreUnreachable(
                f"{self._where} did not send all of {key}",
                reason=f"{len(data)} of {length} bytes arrived",
            )
        return data

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (obs.BaseError, OSError, NotImplementedError) as error:
            raise translate(error, key, self._where) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # pyo3's: no Exception, not importable
                raise
            raise StoreError(
                f"what {self._where} answered for {key} makes no sense", reason=str(error)
            ) from None


class _Source:
    """A stream's parts on their way into obstore; remembers how their maker ended."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = parts
        self.is_used_up = False
        self.error: BaseException | None = None

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The parts, none larger than PART_BYTES: obstore waits for room before each piece."""
        try:
            for part in self._parts:
                view = memoryview(part)
                for begin in range(0, len(view), PART_BYTES):
                    checkpoint()
                    yield view[begin : begin + PART_BYTES]
            self.is_used_up = True
        except GeneratorExit:  # the upload failed first
            raise
        except BaseException as error:
            self.error = error
            raise


def _is_older(path: Path, seconds: float) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > seconds
    except FileNotFoundError:
        return False


def _info(meta: Any) -> ObjectInfo:  # noqa: ANN401
    return ObjectInfo(
        key=str(meta["path"]),
        size_bytes=int(meta["size"]),
        etag=str(meta["e_tag"] or ""),
        last_modified=meta["last_modified"].timestamp(),
    )
