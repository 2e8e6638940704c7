"""The backend for a store's URL: `file:///directory`, `s3://bucket/prefix`, `memory://`."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from obstore import exceptions as obs
from obstore.store import LocalStore, MemoryStore, S3Store

from torpor.errors import HostUnfit, InvalidInput, StoreDenied
from torpor.store.interface import is_key
from torpor.store.objects import PlainStore
from torpor.store.translate import read_words

if TYPE_CHECKING:
    from torpor.config import Settings

_SET_BOTH: Final = "set TORPOR_S3_ACCESS_KEY_ID and TORPOR_S3_SECRET_ACCESS_KEY"
_CREDENTIALS: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_CONNECT_S: Final = 5.0
_STREAM_REPEATS: Final = 100
_SIGNED_S: Final = 240.0  # obstore does not sign a repeated request anew; S3 takes 5 minutes
_NEVER_BELOW: Final = ("/proc", "/sys", "/dev")
_BUT_BELOW: Final = "/dev/shm"
_NEVER: Final = {
    *("/", "/bin", "/boot", "/etc", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/root"),
    *("/run", "/sbin", "/srv", "/tmp", "/usr", "/var", "/var/cache", "/var/lib", "/dev/shm"),
}


def open_plain(settings: Settings, url: str) -> PlainStore:
    """The backend for a store URL; nothing is asked of a remote one yet.

    Raises InvalidInput for a URL that is not understood or a directory that cannot be a store's,
    HostUnfit for one that cannot be made, StoreDenied when there are no credentials at all.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "memory" and separator:
        return PlainStore(MemoryStore(), url)
    if scheme == "file" and rest.startswith("/"):
        return _open_directory(Path(rest), url)
    if scheme == "s3" and rest.partition("/")[0]:
        return _open_s3(settings, url, rest)
    raise InvalidInput(f"not a store: {url!r}", hint="use file:///directory or s3://bucket/prefix")


def _open_directory(directory: Path, url: str) -> PlainStore:
    real = directory.resolve()
    below = any(real.is_relative_to(path) for path in _NEVER_BELOW)
    if str(real) in _NEVER or (below and not real.is_relative_to(_BUT_BELOW)):
        raise InvalidInput(
            f"{url} cannot be a store: {real} is the system's",
            hint="name a directory of its own, like file:///srv/torpor",
        )
    try:
        real.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InvalidInput(f"{url} cannot be a store: {real} is not a directory") from None
    except OSError as error:
        raise HostUnfit(f"cannot make the store {url}", reason=str(error)) from None
    return PlainStore(LocalStore(real), url, directory=real)


def _open_s3(settings: Settings, url: str, rest: str) -> PlainStore:
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if prefix and not is_key(prefix):
        raise InvalidInput(f"not a store: {url!r}", reason=f"{prefix!r} cannot begin a key")
    shared: dict[str, Any] = {
        "prefix": prefix or None,
        "config": _s3_config(settings, url),
        "client_options": {
            "timeout": f"{settings.store_timeout_s}s",
            "connect_timeout": f"{min(settings.store_timeout_s, _CONNECT_S)}s",
            "allow_http": settings.s3_endpoint.startswith("http://"),
        },
    }
    once = _repeats(0, settings.store_timeout_s)  # repeating is store.retry's business
    again = _repeats(_STREAM_REPEATS, settings.store_retry_s)  # parts only obstore can repeat
    try:
        stores = [S3Store(bucket, **shared, retry_config=repeats) for repeats in (once, again)]
    except (obs.BaseError, ValueError) as error:
        reason = read_words(str(error)).reason
        raise InvalidInput(f"cannot open {url} with these settings", reason=reason) from None
    return PlainStore(stores[0], url, streams=stores[1], bulk=True)


def _s3_config(settings: Settings, url: str) -> dict[str, str]:
    config = {"region": settings.s3_region}
    if settings.s3_endpoint:
        config["endpoint"] = settings.s3_endpoint
    if bool(settings.s3_access_key_id) != bool(settings.s3_secret_access_key):
        raise InvalidInput("of the S3 key id and its secret only one is set", hint=_SET_BOTH)
    if settings.s3_access_key_id:
        config["access_key_id"] = settings.s3_access_key_id
        config["secret_access_key"] = settings.s3_secret_access_key
    elif settings.s3_endpoint and not any(name in os.environ for name in _CREDENTIALS):
        # obstore would ask Amazon's metadata service, which such a store has nothing to do with
        raise StoreDenied(f"there are no credentials for {url}", hint=_SET_BOTH)
    return config


def _repeats(count: int, within_s: float) -> Any:  # noqa: ANN401
    return {
        "max_retries": count,
        "retry_timeout": datetime.timedelta(seconds=min(within_s, _SIGNED_S)),
        "backoff": {
            "init_backoff": datetime.timedelta(seconds=0.1),
            "max_backoff": datetime.timedelta(seconds=3),
            "base": 2,
        },
    }
