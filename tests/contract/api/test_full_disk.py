"""Daemons on a full disk, and their store on another one."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import wait_until
from fixtures.daemons import daemon
from fixtures.homes import Home
from fixtures.small_disks import small_disk
from torpor.errors import Incompatible, NoSpace

from .test_remote import in_store, remote, states

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.homes import Furnished

pytestmark = pytest.mark.slow


def test_uploads_deletions_and_wakes(template: Furnished, tmp_path: Path) -> None:
    """They start on a full disk, upload and delete; a wake from the store says that it is full."""
    with small_disk(tmp_path / "small", size_bytes=64 << 20) as disk:
        a, b = (Home(disk.root / name, f"file://{tmp_path}/store") for name in "ab")
        subprocess.run(["cp", "-a", template.home.path, a.path], check=True)
        b.path.mkdir(mode=0o700)
        subprocess.run(["cp", "-p", a.path / "key", b.path], check=True)
        assert [home.run("ls").code for home in (a, b)] == [0, 0]
        disk.fill()
        with daemon(a.path, **remote(a)) as first:
            wait_until(lambda: states(first) == {"f": "stored", "g": "stored"})
            with first.client() as client:
                client.remove_function("g")
                wait_until(lambda: client.status().pending == ())
            assert in_store(a).keys() == {"f"}
        with daemon(b.path, **remote(b)) as second, second.client() as client:
            for room_bytes in (0, 64 << 10, 256 << 10):
                disk.fill(room_bytes=room_bytes)
                with pytest.raises(NoSpace, match="full"):
                    client.restore("f")
                assert client.snapshots() == []
                assert not list((b.path / "snapshots").glob(".*"))
                assert not (b.path / "pager").exists()
            disk.free()
            with pytest.raises(Incompatible):  # a made-up one that no host runs; it was fetched
                client.restore("f")
            assert states(second) == {"f": "stored"}
