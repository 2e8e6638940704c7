"""A Store over obstore, with its exceptions translated; no retries of its own."""

from __future__ import annotations

import contextlib
import datetime
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore import exceptions as obs
from obstore.store import LocalStore, MemoryStore, S3Store

from torpor.errors import (
    Damaged,
    InvalidInput,
    NoSpace,
    ObjectConflict,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreUnreachable,
    TorporError,
)
from torpor.host.cancel import checkpoint
from torpor.host.lock import exclusive
from torpor.store.interface import Absent, Condition, Etag, ObjectInfo, Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torpor.config import Settings

_PART_BYTES: Final = 8 * 1024 * 1024
_KEY = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
_LOCK_WAIT_S: Final = 30.0


class PlainStore(Store):
    """obstore as it is. `lock` is for stores whose own conditional puts know no etag."""

    def __init__(self, store: Any, where: str, *, lock: Path | None = None) -> None:  # noqa: ANN401
        self._store = store
        self._where = where
        self._lock = lock

    def put(self, key: str, data: bytes, *, condition: Condition | None = None) -> str:
        """See Store."""
        check_key(key)
        with self._translated(key):
            if isinstance(condition, Etag) and self._lock is not None:
                return self._put_locked(key, data, condition, self._lock)
            mode: Any = "overwrite"
            if isinstance(condition, Absent):
                mode = "create"
            elif isinstance(condition, Etag):
                mode = {"e_tag": condition.value}
            result = obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            return str(result["e_tag"] or "")

    def put_stream(self, key: str, parts: Iterable[bytes]) -> None:
        """See Store."""
        check_key(key)
        with self._translated(key):
            obstore.put(self._store, key, _sized(parts), chunk_size=_PART_BYTES, max_concurrency=2)

    def get(self, key: str, *, limit_bytes: int) -> tuple[bytes, str]:
        """See Store."""
        check_key(key)
        with self._translated(key):
            result = obstore.get(self._store, key)
            size = int(result.meta["size"])
            if size > limit_bytes:
                raise Damaged(
                    f"object {key} is too large", reason=f"{size} bytes, at most {limit_bytes}"
                )
            return bytes(result.bytes()), str(result.meta["e_tag"] or "")

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See Store."""
        check_key(key)
        with self._translated(key):
            data = bytes(obstore.get_range(self._store, key, start=start, length=length))
        if len(data) != length:
            raise Damaged(
                f"object {key} is too short",
                reason=f"{len(data)} of {length} bytes at offset {start}",
            )
        return data

    def head(self, key: str) -> ObjectInfo:
        """See Store."""
        check_key(key)
        with self._translated(key):
            return _info(obstore.head(self._store, key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See Store."""
        with self._translated(prefix):
            found = [
                _info(meta)
                for batch in obstore.list(self._store, prefix.rstrip("/") or None)
                for meta in batch
            ]
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        """See Store."""
        check_key(key)
        with contextlib.suppress(ObjectMissing), self._translated(key):
            obstore.delete(self._store, key)

    def _put_locked(self, key: str, data: bytes, condition: Etag, lock: Path) -> str:
        with exclusive(lock, timeout_s=_LOCK_WAIT_S, what="the store"):
            now = obstore.head(self._store, key)["e_tag"]
            if now != condition.value:
                raise ObjectConflict(f"object {key} was replaced by somebody else")
            return str(obstore.put(self._store, key, data)["e_tag"] or "")

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (obs.BaseError, OSError) as error:
            raise translate(error, key, self._where) from None


def open_plain(settings: Settings, url: str) -> PlainStore:
    """The backend for a store URL. Raises InvalidInput for one that is not understood."""
    scheme, separator, rest = url.partition("://")
    if scheme == "memory" and separator:
        return PlainStore(MemoryStore(), url)
    if scheme == "file" and rest.startswith("/"):
        directory = Path(rest)
        directory.mkdir(parents=True, exist_ok=True)
        lock = directory / ".lock"
        return PlainStore(LocalStore(directory, mkdir=True), url, lock=lock)
    if scheme == "s3" and rest:
        return _open_s3(settings, url, rest)
    raise InvalidInput(f"not a store: {url!r}", hint="use file:///directory or s3://bucket/prefix")


def _open_s3(settings: Settings, url: str, rest: str) -> PlainStore:
    bucket, _, prefix = rest.partition("/")
    config: Any = {"region": settings.s3_region}
    if settings.s3_endpoint:
        config["endpoint"] = settings.s3_endpoint
    if settings.s3_access_key_id:
        config["access_key_id"] = settings.s3_access_key_id
        config["secret_access_key"] = settings.s3_secret_access_key
    store = S3Store(
        bucket,
        prefix=prefix.strip("/") or None,
        config=config,
        client_options={
            "timeout": f"{settings.store_timeout_s}s",
            "connect_timeout": f"{min(settings.store_timeout_s, 5.0)}s",
            "allow_http": settings.s3_endpoint.startswith("http://"),
        },
        # the one policy for retries is store.retry
        retry_config={"max_retries": 0, "retry_timeout": _seconds(settings.store_timeout_s)},
    )
    return PlainStore(store, url)


def translate(error: Exception, key: str, where: str) -> TorporError:
    """obstore's exception as torpor's, with its words as the reason."""
    words = _first_line(str(error))
    if isinstance(error, obs.NotFoundError | FileNotFoundError):
        return ObjectMissing(f"there is no object {key} in {where}", reason=words)
    if isinstance(error, obs.AlreadyExistsError | obs.PreconditionError | obs.NotModifiedError):
        return ObjectConflict(f"object {key} was written by somebody else", reason=words)
    if isinstance(error, obs.PermissionDeniedError | obs.UnauthenticatedError) or re.search(
        r"40[13]|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch", words
    ):
        return StoreDenied(
            f"{where} denied access to {key}",
            reason=words,
            hint="check key, secret, and what the key may do in the bucket",
        )
    if "No space left" in words or "StorageFull" in words:
        return NoSpace(f"{where} is full, {key} could not be written", reason=words)
    if isinstance(error, obs.GenericError | OSError):
        return StoreUnreachable(
            f"{where} did not answer for {key}",
            reason=words,
            hint="check that it runs and that its address is right",
        )
    return StoreError(f"{where} failed for {key}", reason=words)


def check_key(key: str) -> None:
    """Raise InvalidInput for a key that could leave the prefix."""
    if _KEY.fullmatch(key) is None or any(part in (".", "..") for part in key.split("/")):
        raise InvalidInput(f"not an object key: {key[:80]!r}")


def _sized(parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        checkpoint()
        yield part


def _info(meta: Any) -> ObjectInfo:  # noqa: ANN401
    return ObjectInfo(meta["path"], int(meta["size"]), str(meta["e_tag"] or ""))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:400] if text.strip() else ""


def _seconds(value: float) -> Any:  # noqa: ANN401

    return datetime.timedelta(seconds=value)
