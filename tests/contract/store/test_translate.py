"""Real errors of obstore become the right errors of ours."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from obstore import exceptions as obs

from fixtures.faulty_http import FaultyProxy, Spoil
from torpor.config import Settings
from torpor.errors import (
    NoSpace,
    ObjectConflict,
    ObjectMissing,
    StoreDenied,
    StoreError,
    StoreUnreachable,
)
from torpor.store.interface import Absent, Etag
from torpor.store.plain import open_plain
from torpor.store.translate import translate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torpor.store.interface import Store

pytestmark = [pytest.mark.minio, pytest.mark.slow]

REQUESTS: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put("k", b"data"),
    "create": lambda store: store.put("k", b"data", condition=Absent()),
    "replace": lambda store: store.put("k", b"data", condition=Etag('"e"')),
    "stream": lambda store: store.put_stream("k", iter((b"data",))),
    "get": lambda store: store.get("k", limit_bytes=9),
    "range": lambda store: store.get_range("k", 0, 1),
    "prefix": lambda store: store.get_prefix("k", 1),
    "head": lambda store: store.head("k"),
    "list": lambda store: list(store.list("")),
    "delete": lambda store: store.delete("k"),
    "delete many": lambda store: store.delete_many(["k", "l"]),
}


def plain(settings: Settings) -> Store:
    """The backend alone, with single requests that fail at once."""
    return open_plain(replace(settings, store_retry_s=0.0), settings.store)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_wrong_secret(s3_settings: Settings, request_name: str) -> None:
    """Whatever is asked with a wrong secret is StoreDenied."""
    store = plain(replace(s3_settings, s3_secret_access_key="wrong"))
    with pytest.raises(StoreDenied, match="denied access"):
        REQUESTS[request_name](store)


@pytest.mark.parametrize("request_name", [name for name in REQUESTS if name != "head"])
def test_no_bucket(s3_settings: Settings, request_name: str) -> None:
    """A bucket that is not there is said to be missing, not the object."""
    store = plain(replace(s3_settings, store="s3://no-such-bucket/p"))
    with pytest.raises(StoreError, match="there is no bucket") as caught:
        REQUESTS[request_name](store)
    assert type(caught.value) is StoreError
    assert "NoSuchBucket" in caught.value.reason


@pytest.mark.parametrize("request_name", REQUESTS)
def test_nobody_listens(s3_settings: Settings, request_name: str) -> None:
    """A port where nobody listens is StoreUnreachable, with the system's words."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = plain(replace(s3_settings, s3_endpoint=f"http://127.0.0.1:{port}"))
    with pytest.raises(StoreUnreachable, match="Connection refused"):
        REQUESTS[request_name](store)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_no_answer_in_time(s3_settings: Settings, request_name: str) -> None:
    """A server that takes the connection and says nothing is StoreUnreachable in the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        settings = replace(s3_settings, s3_endpoint=f"http://127.0.0.1:{port}")
        store = plain(replace(settings, store_timeout_s=0.2))
        with pytest.raises(StoreUnreachable, match="it took too long"):
            REQUESTS[request_name](store)


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (503, "SlowDown", StoreUnreachable),
        (500, "InternalError", StoreUnreachable),
        (502, "", StoreUnreachable),
        (504, "", StoreUnreachable),
        (429, "TooManyRequests", StoreUnreachable),
        (408, "", StoreUnreachable),
        (403, "AccessDenied", StoreDenied),
        (401, "", StoreDenied),
        (507, "XMinioStorageFull", NoSpace),
        (501, "NotImplemented", StoreError),
        (400, "InvalidArgument", StoreError),
    ],
)
def test_statuses(
    proxied: Settings,
    proxy: FaultyProxy,
    request_name: str,
    status: int,
    code: str,
    error: type[StoreError],
) -> None:
    """The status decides what an answer means, for every request."""
    proxy.spoil(Spoil("status", status=status, code=code, times=None))
    with pytest.raises((StoreError, NoSpace)) as caught:
        REQUESTS[request_name](plain(proxied))
    assert type(caught.value) is error, caught.value
    assert f"HTTP status {status}" in caught.value.reason


@pytest.mark.parametrize("code", ["RequestTimeout", "IncompleteBody", "BadDigest"])
def test_bad_requests_that_pass(proxied: Settings, proxy: FaultyProxy, code: str) -> None:
    """What S3 calls a bad request though the network is to blame is worth repeating."""
    proxy.spoil(Spoil("status", status=400, code=code))
    with pytest.raises(StoreUnreachable, match=code):
        plain(proxied).put("a", b"data")


@pytest.mark.parametrize(
    ("key", "status", "error"),
    [
        ("packs/403", 503, StoreUnreachable),
        ("packs/AccessDenied-401-404", 503, StoreUnreachable),
        ("packs/No-space-left-StorageFull", 503, StoreUnreachable),
        ("packs/503-SlowDown-InternalError", 403, StoreDenied),
        ("status/503", 403, StoreDenied),
    ],
)
def test_what_a_key_contains_means_nothing(
    proxied: Settings, proxy: FaultyProxy, key: str, status: int, error: type[StoreError]
) -> None:
    """Digits and names of errors in a key or in an answer's text do not change the error."""
    code = "X</Code><Message>status: 200, code: SlowDown 403 404</Message><Code>Y"
    proxy.spoil(Spoil("status", status=status, code=code, times=None))
    for call in (plain(proxied).head, lambda key: plain(proxied).get_range(key, 0, 9)):
        with pytest.raises(StoreError) as caught:
            call(key)
        assert type(caught.value) is error


def test_missing_and_conflict(s3_settings: Settings) -> None:
    """A missing object and a condition that does not hold are told from everything else."""
    store = plain(s3_settings)
    with pytest.raises(ObjectMissing, match="NoSuchKey"):
        store.get("no", limit_bytes=1)
    store.put("there", b"1")
    with pytest.raises(ObjectConflict, match="PreconditionFailed"):
        store.put("there", b"2", condition=Absent())


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_that_is_not_settled(proxied: Settings, proxy: FaultyProxy, code: str) -> None:
    """A 409 that says that another write is under way is worth repeating, not yet a conflict."""
    proxy.spoil(Spoil("status", status=409, code=code))
    with pytest.raises(StoreUnreachable, match=code):
        plain(proxied).put("a", b"1", condition=Absent())


def test_a_redirect_that_leads_nowhere(proxied: Settings, proxy: FaultyProxy) -> None:
    """It is what a wrong region looks like; repeating does not help."""
    proxy.spoil(Spoil("status", status=301))
    with pytest.raises(StoreError) as caught:
        plain(proxied).head("a")
    assert type(caught.value) is StoreError
    assert "region" in caught.value.hint


@pytest.mark.parametrize(
    ("request_name", "kind"),
    [
        *((name, "reset answer") for name in ("get", "range", "prefix")),
        *((name, "truncate answer") for name in ("get", "range", "prefix")),
        *((name, "shorten answer") for name in ("range", "prefix")),
    ],
)
def test_short_bodies(proxied: Settings, proxy: FaultyProxy, kind: str, request_name: str) -> None:
    """An answer whose body ends too early is StoreUnreachable, never data."""
    store = plain(proxied)
    store.put("k", b"123456")
    proxy.spoil(Spoil(kind, method="GET"))
    reads = {
        "get": lambda: store.get("k", limit_bytes=9),
        "range": lambda: store.get_range("k", 0, 6),
        "prefix": lambda: store.get_prefix("k", 6),
    }
    with pytest.raises(StoreUnreachable):
        reads[request_name]()
    assert [hit for *_, hit in proxy.seen if hit] == [kind]


@pytest.mark.parametrize("kind", ["truncate answer", "shorten answer"])
def test_half_a_list(proxied: Settings, proxy: FaultyProxy, kind: str) -> None:
    """Half of a list is no shorter list."""
    store = plain(proxied)
    for number in range(5):
        store.put(f"packs/{number}", b"")
    proxy.spoil(Spoil(kind, method="GET", target="list-type"))
    with pytest.raises(StoreUnreachable):
        list(store.list(""))


@pytest.mark.parametrize(
    ("code", "error"), [("AccessDenied", StoreDenied), ("InternalError", StoreUnreachable)]
)
def test_single_keys_that_bulk_deletion_refuses(
    proxied: Settings, proxy: FaultyProxy, code: str, error: type[StoreError]
) -> None:
    """Deletion in bulk answers 200 with an error for a key; its code decides."""
    key = proxied.store.removeprefix("s3://").partition("/")[2] + "/k"
    refused = f"<Key>{key}</Key><Code>{code}</Code><Message>no</Message>"
    text = f"<DeleteResult><Error>{refused}</Error></DeleteResult>"
    proxy.spoil(Spoil("status", method="POST", status=200, body=text))
    with pytest.raises(StoreError) as caught:
        plain(proxied).delete_many(["k"])
    assert type(caught.value) is error, caught.value


def test_an_answer_that_obstore_panics_on(proxied: Settings, proxy: FaultyProxy) -> None:
    """Where Rust panics, as on an error for a key that was not asked, it is StoreError."""
    refused = "<Key>another</Key><Code>AccessDenied</Code><Message>no</Message>"
    text = f"<DeleteResult><Error>{refused}</Error></DeleteResult>"
    proxy.spoil(Spoil("status", method="POST", status=200, body=text))
    with pytest.raises(StoreError, match="makes no sense"):
        plain(proxied).delete_many(["k"])


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EACCES, StoreDenied),
        (errno.EROFS, StoreDenied),
        (errno.EIO, StoreError),
        (errno.ENOTDIR, StoreError),
    ],
)
def test_errors_of_files(code: int, error: type[Exception]) -> None:
    """A file store's errors are told by errno, in obstore's words and in Python's."""
    text = (
        "Generic LocalFileSystem error: Unable to copy data to file\n\nDebug source:\nGeneric {\n"
        '    store: "LocalFileSystem",\n    source: UnableToCopyDataToFile {\n'
        f'        source: Os {{\n            code: {code},\n            message: "words",\n'
        "        },\n    },\n}"
    )
    for raised in (obs.GenericError(text), OSError(code, "words")):
        found = translate(raised, "packs/403", "file:///s")
        assert type(found) is error
        assert "words" in found.reason


def test_a_directory_in_an_objects_place(tmp_path: Path) -> None:
    """What a file system cannot do is StoreError with its words, and not repeated."""
    store = open_plain(Settings(), f"file://{tmp_path}/store")
    store.put("a/b", b"")
    with pytest.raises(StoreError, match="Is a directory") as caught:
        store.put("a", b"")
    assert type(caught.value) is StoreError
