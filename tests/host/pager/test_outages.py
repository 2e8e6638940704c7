"""Stores fail: for a while, and readers wait; for good, and they end with an error; never zeros."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.faulty_http import Spoil
from fixtures.pagers import PagerHome, sha256_of, until
from torpor.errors import ObjectMissing, StoreError
from torpor.snapshot.manifest import decode_outline, outline_of
from torpor.units import MiB

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.faulty_http import FaultyProxy
    from fixtures.minio import MinioServer
    from torpor.config import Settings

pytestmark = pytest.mark.host
minio = pytest.mark.minio


def flip(path: Path, offset: int) -> None:
    """Change a bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@minio
@pytest.mark.parametrize("target", ["/refs/", "/manifest", "/images/", "/packs/", "/wake"])
def test_requests_that_fail_in_passing(proxied: PagerHome, proxy: FaultyProxy, target: str) -> None:
    """Whatever a pager asks for, connections that break a few times only cost time."""
    proxied.publish()
    proxy.spoil(Spoil("reset request", method="GET", target=target, times=3))
    served = proxied.open()
    with proxied.known(served):
        proxied.client.go(served.digest)
        proxied.check("f", served)
        assert proxied.client.wait_pushed(served.digest, timeout_s=60)
    assert proxied.client.failure(served.digest) == ""
    assert sum(spoilt != "" for _, _, spoilt in proxy.seen) == 3


@minio
@pytest.mark.chaos
def test_store_is_restarted_under_a_reader(tmp_path: Path, mortal_minio: MinioServer) -> None:
    """A read that began while the store was dead ends with the right bytes when it is back."""
    with PagerHome(tmp_path / "node", mortal_minio.settings) as home:
        home.publish()
        served = home.open(push=False)
        mortal_minio.kill()
        readers = [home.read(path, "mapped") for path in served.files.values()]
        until(lambda: home.client.counters()["fetched"]["failures"] > 0)
        home.signal("pager")
        until(lambda: home.client.counters()["fetched"]["failures"] > 0)
        mortal_minio.start()
        mortal_minio.wait_ready()
        assert all(len(reader.result()) == 64 for reader in readers)
        home.check("f", served)
        assert home.client.failure(served.digest) == ""


@minio
@pytest.mark.chaos
def test_store_is_gone_for_good(tmp_path: Path, mortal_minio: MinioServer) -> None:
    """After the deadline reads fail, naming window and object; opened anew it works again."""
    settings = replace(mortal_minio.settings, pager_deadline_s=1.0)
    with PagerHome(tmp_path / "node", settings) as home:
        snapshot = home.publish(windows=range(0, 200))
        served = home.open(push=False)
        memory = served.files["memory"]
        until(lambda: home.read(served.files["image"], "whole").result() != "")
        home.read(memory, "range", 0, 16384).result()
        mortal_minio.kill()
        status, words = home.read(memory, "whole").end()
        assert (status, "Input/output error" in words) == (1, True)
        assert home.read(memory, "mapped").end()[0] == -signal.SIGBUS
        failure = home.client.failure(served.digest)
        assert failure.startswith("memory: window ")
        assert "object packs/" in failure
        assert "within 1 s" in failure
        assert (
            home.read(memory, "range", 220 * 16384, 16384).result()
            == home.read(snapshot.memory, "range", 220 * 16384, 16384).result()
        )
        assert (
            home.read(memory, "range", 0, 16384).result()
            == home.read(snapshot.memory, "range", 0, 16384).result()
        )
        mortal_minio.start()
        mortal_minio.wait_ready()
        home.check("f", home.open())


@minio
def test_store_that_hangs(proxy: FaultyProxy, tmp_path: Path, s3_settings: Settings) -> None:
    """A store that takes requests and never answers is one that is gone."""
    settings = replace(s3_settings, s3_endpoint=proxy.endpoint, pager_deadline_s=1.0)
    with PagerHome(tmp_path / "node", settings) as home:
        home.publish()
        served = home.open(push=False)
        proxy.spoil(Spoil("hang", method="GET", target="/packs/", times=None))
        assert home.read(served.files["memory"], "whole").end()[0] == 1
        assert "within 1 s" in home.client.failure(served.digest)
        assert home.client.close(served.digest) == 0


@minio
def test_files_are_there_before_the_manifest(
    proxy: FaultyProxy, tmp_path: Path, s3_settings: Settings
) -> None:
    """By what the ref says files are served at once; what is not here yet readers wait for."""
    with PagerHome(tmp_path / "node", replace(s3_settings, s3_endpoint=proxy.endpoint)) as home:
        snapshot = home.publish()
        home.client.ensure()
        proxy.spoil(Spoil("delay", method="GET", target="/manifest", delay_s=1.5))
        begun = home.client.begin("f", home.source)
        assert decode_outline(begun.outline, begun.digest) == outline_of(snapshot.manifest)
        assert begun.files["memory"].stat().st_size == snapshot.manifest.memory.size_bytes
        assert home.client.opened() == [], "it cannot be closed before it is open"
        reader = home.read(begun.files["memory"], "whole")
        assert not (home.settings.home / "snapshots" / begun.digest).exists()
        spans = home.client.complete(begun.digest)
        assert spans is not None
        assert {span.name for span in spans} >= {"resolve", "manifest", "wake object", "publish"}
        assert reader.result() == sha256_of(snapshot.memory)
        assert home.client.opened() == [begun.digest]


@minio
def test_what_was_begun_does_not_come(
    proxy: FaultyProxy, tmp_path: Path, s3_settings: Settings
) -> None:
    """Who waits for it is told why, who reads it gets an error, and nothing is open then."""
    settings = replace(s3_settings, s3_endpoint=proxy.endpoint, pager_deadline_s=1.0)
    with PagerHome(tmp_path / "node", settings) as home:
        home.publish()
        home.client.ensure()
        proxy.spoil(Spoil("hang", method="GET", target="/manifest", times=None))
        begun = home.client.begin("f", home.source)
        reader = home.read(begun.files["memory"], "whole")
        with pytest.raises(StoreError):
            home.client.complete(begun.digest)
        assert reader.end()[0] == 1
        assert home.client.opened() == []
        assert not begun.files["memory"].exists()
        assert [*(home.settings.home / "snapshots").iterdir()] == []


@minio
def test_what_a_reader_waits_for(proxy: FaultyProxy, tmp_path: Path, s3_settings: Settings) -> None:
    """While a window does not come, who waits for it can be told which it is; nobody is else."""
    with PagerHome(tmp_path / "node", replace(s3_settings, s3_endpoint=proxy.endpoint)) as home:
        home.publish(windows=range(256))
        served = home.open(push=False)
        assert home.client.waiting(served.digest) == ""
        proxy.spoil(Spoil("hang", method="GET", target="/packs/", times=None))
        home.read(served.files["memory"], "range", 220 * 16384, 16384)
        until(lambda: home.client.waiting(served.digest) != "")
        assert home.client.waiting(served.digest).startswith("memory: window 220, asked for ")
        assert home.client.failure(served.digest) == ""


@minio
@pytest.mark.chaos
def test_pager_dies_without_a_store(tmp_path: Path, mortal_minio: MinioServer) -> None:
    """A successor serves what is on this node though the store does not answer."""
    with PagerHome(tmp_path / "node", mortal_minio.settings) as home:
        home.publish()
        served = home.open()
        home.client.hydrate(served.digest, limit_bytes=64 * MiB, limit_s=60)
        assert home.client.wait_hydrated(served.digest, timeout_s=60)
        mortal_minio.kill()
        home.signal("pager")
        home.check("f", served)
        assert home.counted("f")["store"] == 0


def test_damage_in_the_store(home: PagerHome, tmp_path: Path) -> None:
    """A chunk that is not right is never served: the read fails, with window and object named."""
    home.publish(windows=range(100))
    served = home.open(push=False)
    packs = sorted((tmp_path / "store" / "packs").iterdir())
    for pack in packs:
        flip(pack, pack.stat().st_size // 2)
    status, words = home.read(served.files["memory"], "whole").end()
    assert (status, "Input/output error" in words) == (1, True)
    failure = home.client.failure(served.digest)
    assert failure.startswith("memory: window ")
    assert "is damaged" in failure
    assert any(pack.name in failure for pack in packs)


def test_missing_in_the_store(home: PagerHome, tmp_path: Path) -> None:
    """A pack that was deleted is an error at once; a wake object that was, when it is opened."""
    home.publish("f")
    home.publish("g", seed=2)
    served = home.open("f", push=False)
    for pack in (tmp_path / "store" / "packs").iterdir():
        pack.unlink()
    assert home.read(served.files["memory"], "whole").end()[0] == 1
    assert "has no object" in home.client.failure(served.digest) or "no object" in (
        home.client.failure(served.digest)
    )
    for wake in (tmp_path / "store" / "snapshots").glob("*/*/wake"):
        wake.unlink()
    with pytest.raises(ObjectMissing, match="wake"):
        home.open("g")
    assert home.client.opened() == [served.digest]
    assert [path.name for path in (home.settings.home / "snapshots").iterdir()] == [served.digest]


def test_successor_knows_what_could_not_be_had(home: PagerHome, tmp_path: Path) -> None:
    """A pager that dies before anybody asked why has told it: each file's window is named after.

    The successor asks for the window again; what is opened anew has no failure.
    """
    home.publish(windows=range(100))
    served = home.open(push=False)
    packs = {pack: pack.read_bytes() for pack in (tmp_path / "store" / "packs").iterdir()}
    for pack in packs:
        pack.unlink()
    for name in ("memory", "image"):
        assert home.read(served.files[name], "whole").end()[0] == 1
    failure = home.client.failure(served.digest)
    home.signal("pager")
    home.client.counters()
    assert home.client.failure(served.digest) == failure
    assert [part.split(": window ")[0] for part in failure.split("; ")] == ["memory", "image"]
    for pack, data in packs.items():
        pack.write_bytes(data)
    home.check("f", served)
    assert home.client.close(served.digest) == 0
    assert home.client.failure(home.open().digest) == ""


def test_damaged_working_set(home: PagerHome, tmp_path: Path) -> None:
    """A segment that is not right ends the push; the guest gets its windows by demand."""
    home.publish()
    (wake,) = (tmp_path / "store" / "snapshots").glob("*/*/wake")
    flip(wake, wake.stat().st_size - 10)
    served = home.open()
    with home.known(served):
        home.client.go(served.digest)
        assert home.client.wait_pushed(served.digest, timeout_s=60)
        home.check("f", served)
    (snapshot,) = home.client.counters()["snapshots"].values()
    assert "is damaged" in snapshot["push"]["failure"]
    assert home.client.failure(served.digest) == ""
