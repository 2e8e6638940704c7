"""A store that takes requests and answers nothing, for a while or for good."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from fixtures.commands import wait_until
from fixtures.daemons import daemon
from torpor.errors import Incompatible, StoreUnreachable

from .test_remote import states

if TYPE_CHECKING:
    from collections.abc import Callable

    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished, Home
    from fixtures.minio import MinioServer
    from torpor import Client

pytestmark = [pytest.mark.slow, pytest.mark.minio]

_ASK_S, _TIMEOUT_S = 1.0, 2.0
_SOON_S = 2.8
"""Less than a request to the store takes to fail."""

_ENDS_S = 2 * _TIMEOUT_S + 4.0
"""A request, another one after it, and what a busy machine adds."""


def timed(work: Callable[[], object], *, within_s: float) -> object:
    """What work gives or raises, in time."""
    began_s = time.monotonic()
    try:
        return work()
    finally:
        took_s = time.monotonic() - began_s
        assert took_s < within_s, took_s


def asked(gateway: str, name: str) -> int:
    """The status of a request for a function."""
    try:
        with urllib.request.urlopen(f"{gateway}/f/{name}/", timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def lives(served: DaemonProcess) -> None:
    """The API, its metrics, and a wake of what the node has wait for no store."""
    transport = httpx.HTTPTransport(uds=str(served.socket))
    with httpx.Client(transport=transport, base_url="http://torpor", timeout=30) as http:
        for path in ("/v1/status", "/metrics", "/v1/functions"):
            answer = timed(lambda path=path: http.get(path), within_s=_SOON_S)  # type: ignore[misc]
            assert isinstance(answer, httpx.Response)
            assert answer.status_code == 200


def stop_twice(served: DaemonProcess) -> int:
    """SIGTERM, and another one while the daemon drains."""
    assert served.process is not None
    drains = served.said().count("draining")
    served.process.send_signal(signal.SIGTERM)
    wait_until(lambda: served.said().count("draining") > drains)
    return served.stop()


def refused(client: Client, name: str) -> bool:
    """Whether a wake is told that the store is gone."""
    with pytest.raises(StoreUnreachable) as caught:
        client.restore(name)
    return bool(caught.value.hint)


def test_store_that_hangs(a: Furnished, b: Home, mortal_minio: MinioServer) -> None:
    """Who needs it is told in bounded time, nobody else waits; when it answers all goes on.

    With one that stays silent the daemon ends in bounded time too, and soon if it is to hurry.
    """
    keys = ("store", "key", "s3_endpoint", "s3_access_key_id", "s3_secret_access_key")
    settings = {key: str(getattr(mortal_minio.settings, key)) for key in keys}
    settings |= {"snapshots": "remote", "upload_retry_s": "1", "store_retry_s": "1"}
    settings |= {"store_timeout_s": str(_TIMEOUT_S), "store_ask_s": str(_ASK_S)}
    mortal_minio.hang()
    with (
        daemon(a.home.path, **settings) as first,
        daemon(b.path, **settings, log_format="json") as second,
        first.client() as on_a,
        second.client() as on_b,
        ThreadPoolExecutor(40) as pool,
    ):
        gateway, elsewhere = on_a.status().gateway, on_b.status().gateway
        waiting = [
            *(pool.submit(asked, gateway, f"unknown-{i}") for i in range(8)),
            *(pool.submit(asked, elsewhere, "f") for _ in range(4)),
        ]
        told = [pool.submit(refused, on_a, f"unknown-{i}") for i in range(8)]
        told += [pool.submit(refused, on_b, "f")]
        began_s = time.monotonic()
        lives(first)
        for name in ("f", "g"):  # no host runs these made-up ones: it has found them here
            assert timed(lambda name=name: asked(gateway, name), within_s=_SOON_S) == 502  # type: ignore[misc]
            with pytest.raises(Incompatible):
                timed(lambda name=name: on_a.restore(name), within_s=_SOON_S)  # type: ignore[misc]
        lives(second)
        assert all(one.result() for one in told)
        assert {one.result() for one in waiting} == {503}
        assert time.monotonic() - began_s < 2 * _ENDS_S
        wait_until(lambda: any(s.startswith("pending: ") for s in states(first).values()))

        mortal_minio.go_on()
        wait_until(lambda: states(first) == {"f": "stored", "g": "stored"})
        with pytest.raises(Incompatible):  # it was fetched
            on_b.restore("f")
        mortal_minio.hang()
        for within_s in (_SOON_S, _ASK_S):  # the second one knows that the store is silent
            with pytest.raises(Incompatible):
                timed(lambda: on_a.restore("f"), within_s=within_s)
        timed(lambda: on_a.remove_function("g"), within_s=_SOON_S)
        assert on_a.status().pending == ("g",)
        assert timed(first.stop, within_s=_ENDS_S) == 0
        first.settings = {**first.settings, "store_timeout_s": "120"}
        first.start()
        signal.sigtimedwait([], 1.5)  # the deletion is under way then
        assert timed(lambda: stop_twice(first), within_s=_ENDS_S) == 0
        mortal_minio.go_on()
        first.start()
        wait_until(lambda: on_a.status().pending == ())
    lines = [json.loads(line) for line in second.said().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
