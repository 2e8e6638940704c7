"""How much memory a pager needs: bounded, however many snapshots are open."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import Quiet
from torpor.host.sparse import copy_sparse
from torpor.snapshot.manifest import Function
from torpor.snapshot.repository.pushing import PushOptions, push
from torpor.snapshot.repository.repository import Repository
from torpor.snapshot.windows import WINDOW_BYTES, Touched
from torpor.store.stack import open_store
from torpor.units import MiB

if TYPE_CHECKING:
    from fixtures.pagers import PagerHome
    from torpor.snapshot.local import LocalSnapshot

pytestmark = pytest.mark.host

SNAPSHOTS = 64
MEMORY_BYTES = 256 * MiB
BOUND_BYTES = 150_000_000


def written(name: str, window: int) -> bytes:
    """What a child has at the beginning of a window that its parent has not."""
    return f"{window} of {name}".encode().ljust(64, b".")


def make_children(home: PagerHome, parent: LocalSnapshot) -> list[str]:
    """Push snapshots of the same image whose memory differs in some windows."""
    names = []
    function = parent.manifest.function
    assert function is not None
    repository = Repository(open_store(home.settings), home.keyring)
    images = {d: home.node.images[d] for d in (parent.manifest.image, function.app)}
    for number in range(SNAPSHOTS - 1):
        name = f"f{number}"
        with home.node.snapshots.stage() as staging:
            copy_sparse(parent.memory, staging.memory)
            copy_sparse(parent.disk, staging.disk)
            staging.vmstate.write_bytes(parent.vmstate.read_bytes())
            with staging.memory.open("r+b") as stream:
                for window in range(100, 150):
                    stream.seek(window * 3 * WINDOW_BYTES)
                    stream.write(written(name, window * 3))
            staging.record_written([(w * 3 * WINDOW_BYTES, 4096) for w in range(100, 150)])
            digest = staging.publish(
                kind="instance",
                created_ns=number,
                parent=parent.digest,
                platform=parent.manifest.platform,
                machine=parent.manifest.machine,
                image=parent.manifest.image,
                function=Function(name, 1, 8080, function.app),
            )
        child = home.node.snapshots.get(digest)
        child.record_working_set([Touched("memory", tuple(range(300, 450)))])
        push(repository, child, ref=name, images=images, base=None, progress=Quiet())
        home.node.snapshots.remove(digest)
        names.append(name)
    return names


def test_many_open_snapshots(home: PagerHome) -> None:
    """64 snapshots of 256 MiB opened at once, pushed and read in part: the pager stays small.

    It is the bound that SPECIFICATION.md promises, on the most that the process ever had.
    """
    windows = range(0, MEMORY_BYTES // WINDOW_BYTES, 16)
    parent = home.publish(
        memory_bytes=MEMORY_BYTES,
        windows=windows,
        touched=tuple(range(150)),
        options=PushOptions(),
        used_bytes=4096,
    )
    whole = parent.memory.read_bytes()[: 1200 * WINDOW_BYTES]
    names = ["f", *make_children(home, parent)]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(16) as threads:

        def use(name: str) -> None:
            served = home.open(name)
            memory = stack.enter_context(home.known(served))["memory"]
            home.client.go(served.digest)
            for window in range(0, 1200, 40):
                found = os.pread(memory, WINDOW_BYTES, window * WINDOW_BYTES)
                expected = whole[window * WINDOW_BYTES : (window + 1) * WINDOW_BYTES]
                if name != "f" and window in range(300, 450, 3):
                    expected = written(name, window) + expected[64:]
                assert found == expected
            assert home.client.wait_pushed(served.digest, timeout_s=60)

        list(threads.map(use, names))
        opened = home.client.opened()
        counted = home.client.counters()
        assert len(opened) == SNAPSHOTS
        pushed = [one["push"]["windows"] for one in counted["snapshots"].values()]
        assert min(pushed) >= 150
        peak_bytes = counted["peak_bytes"]
        print(f"peak {peak_bytes / 1e6:.1f} MB")  # noqa: T201
        assert peak_bytes <= BOUND_BYTES
    for digest in opened:
        home.client.close(digest)
    assert home.client.counters()["cache"]["protected"] == 0
