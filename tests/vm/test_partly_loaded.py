"""Snapshots of instances whose memory is only partly here, and generations of such snapshots.

The store is a real MinIO, but where it goes away; a home has nothing but its address and the key.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import ask, running
from torpor.errors import StoreUnreachable
from torpor.host.pagemap import PAGE_BYTES, find_mapping
from torpor.host.process import run
from torpor.host.sparse import describe_sparse
from torpor.node.node import Node
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.vmm.qemu.driver import QemuVmm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from torpor.config import Settings
    from torpor.node.live import Instance
    from torpor.snapshot.local import LocalSnapshot

pytestmark = [pytest.mark.vm, pytest.mark.minio]


@pytest.fixture
async def on_minio(node: Node, minio_settings: Settings) -> Node:
    """The node with the deployed functions, whose store is MinIO; the ledger is there."""
    settings = replace(minio_settings, home=node.parts.settings.home)
    made = Node(replace(node.parts, settings=settings))
    await made.push("ledger")
    return made


@pytest.fixture
def lazy_settings(minio_settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a node that has nothing but the store, and wakes lazily."""
    return replace(minio_settings, home=tmp_path / "lazy", lazy=True)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, without reading them."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE) as content:
            yield content
    finally:
        os.close(descriptor)


def resident_windows(path: Path) -> set[int]:
    """The windows of which something is in the page cache (mincore(2)); none is read for that."""
    with mapped(path) as content:
        pages = (ctypes.c_ubyte * (len(content) // PAGE_BYTES))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(content))
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(content)), pages)
        assert failed == 0, os.strerror(ctypes.get_errno())
    per_window = WINDOW_BYTES // PAGE_BYTES
    return {page // per_window for page, state in enumerate(pages) if state & 1}


def windows_of(extents: tuple[tuple[int, int], ...]) -> set[int]:
    """The windows that (offset, length) runs touch."""
    return {
        window
        for offset, length in extents
        for window in range(offset // WINDOW_BYTES, (offset + length - 1) // WINDOW_BYTES + 1)
    }


def memory_of(instance: Instance) -> bytes:
    """All of a paused VM's memory, as its process sees it; what is missing arrives for that."""
    process = instance.vmm.process
    assert process is not None
    mapping = find_mapping(process.pid, instance.vmm.config.memory)
    with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(mapping.start)
        content = b""
        while len(content) < mapping.end - mapping.start:
            content += memory.read(mapping.end - mapping.start - len(content))
    return content


def differing_windows(one: bytes | mmap.mmap, other: bytes | mmap.mmap) -> set[int]:
    """The windows in which two memories differ."""
    assert len(one) == len(other)
    places = range(0, len(one), WINDOW_BYTES)
    return {
        place // WINDOW_BYTES
        for place in places
        if one[place : place + WINDOW_BYTES] != other[place : place + WINDOW_BYTES]
    }


@contextlib.asynccontextmanager
async def left_paused(
    node: Node, instance: Instance, *, then: Callable[[], object] = lambda: None
) -> AsyncIterator[None]:
    """A snapshot in the body leaves the VM paused; it runs on when the body ends.

    `then` is done when everything that belongs into the pause has been.
    """

    async def stay(vmm: QemuVmm) -> None:
        then()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(QemuVmm, "_resume", stay)
        yield
    await node.instances.thaw(node.parts.journal.instance(instance.id))


@pytest.mark.parametrize("fetching", ["on demand", "pushed", "hydrating"])
async def test_every_window_is_right(
    on_minio: Node, lazy_settings: Settings, tmp_path: Path, fetching: str
) -> None:
    """Each window of memory and disk is what the VM had, whether it was fetched before or not.

    What was not written is the parent's, as an eager node has it. The snapshot travels on and
    wakes where all of it is fetched first.
    """
    parent = (await on_minio.inspect("ledger")).snapshot
    hydrate_bytes = 1 << 30 if fetching == "hydrating" else 0
    async with Node.open(replace(lazy_settings, hydrate_bytes=hydrate_bytes)) as lazy:
        lazy.paging.pushes = fetching != "on demand"
        async with running(lazy, "ledger") as instance:
            await ask(instance, "POST", body={"amount": 7, "note": "row"})
            here = resident_windows(instance.vmm.config.memory)
            async with left_paused(lazy, instance):
                captured = await lazy.create_snapshot(instance.id, name=f"onward-{fetching[:2]}")
                live = memory_of(instance)
                scratch = describe_sparse(instance.directory / "scratch")
            assert (await ask(instance))["count"] == 1
        await lazy.push(f"onward-{fetching[:2]}")
    nonzero = windows_of(parent.manifest.memory.extents)
    if fetching != "hydrating":
        assert len(nonzero - here) > len(nonzero) // 4, "nothing was missing"
    check_memory(captured.snapshot, live, parent)
    assert describe_sparse(captured.snapshot.disk) == scratch
    async with Node.open(replace(lazy_settings, home=tmp_path / "eager", lazy=False)) as eager:
        pulled, _ = await eager.pull(captured.snapshot.digest)
        with mapped(pulled.snapshot.memory) as arrived:
            assert differing_windows(arrived, live) == set()
        assert describe_sparse(pulled.snapshot.disk) == scratch
        async with running(eager, captured.snapshot.digest) as again:
            seen = await ask(again)
    assert (seen["count"], seen["sum"], seen["integrity"]) == (1, 7, "ok")


async def test_snapshot_while_the_store_is_away(
    node: Node, fresh_settings: Settings, tmp_path: Path
) -> None:
    """It fails with the window that did not come, and costs nobody the instance.

    When the store is back a snapshot of the same instance is right.
    """
    await node.push("ledger")
    store = Path(fresh_settings.store.removeprefix("file://"))
    away = store.with_name("away")
    settings = replace(fresh_settings, lazy=True, pager_deadline_s=1.0)
    async with Node.open(settings) as lazy:
        lazy.paging.pushes = False
        async with running(lazy, "ledger") as instance:
            await ask(instance, "POST", body={"amount": 7, "note": "row"})
            async with left_paused(lazy, instance, then=lambda: store.rename(away)):
                try:
                    with pytest.raises(StoreUnreachable, match=r"memory: window [0-9]+: "):
                        await lazy.create_snapshot(instance.id, name="late")
                finally:
                    away.rename(store)
            assert lazy.parts.journal.ref("late") is None
            async with left_paused(lazy, instance):
                captured = await lazy.create_snapshot(instance.id, name="late")
                live = memory_of(instance)
            assert (await ask(instance))["count"] == 1
    check_memory(captured.snapshot, live, (await node.inspect("ledger")).snapshot)


def check_memory(snapshot: LocalSnapshot, live: bytes, parent: LocalSnapshot) -> None:
    """A snapshot's memory is the VM's; it is the parent's wherever nothing was written."""
    written = snapshot.written()
    assert written is not None
    with mapped(snapshot.memory) as content, mapped(parent.memory) as before:
        assert differing_windows(content, live) == set()
        changed = differing_windows(content, before)
    assert changed
    assert changed <= windows_of(written)


async def test_ten_generations_through_the_pager(
    on_minio: Node, lazy_settings: Settings, tmp_path: Path
) -> None:
    """Ten nodes one after the other, each with nothing but the store, wake what the last one left.

    Every committed row is there at the end, in order; database and file system are sound; no node
    leaves anything on the host.
    """
    name = "ledger"
    for generation in range(1, 11):
        settings = replace(lazy_settings, home=tmp_path / f"node-{generation}")
        async with Node.open(settings) as fresh:
            async with running(fresh, name) as instance:
                assert instance.parent is not None
                assert instance.parent.served is not None
                added = await ask(instance, "POST", body={"amount": generation, "note": "row"})
                await fresh.create_snapshot(instance.id, name="carried")
            await fresh.push("carried")
        assert added["number"] == generation
        assert fresh.parts.journal.instances() == []
        assert not (settings.home / "pager").exists()
        shutil.rmtree(settings.home)
        name = "carried"
    async with Node.open(lazy_settings) as last:
        instance = await last.restore(name)
        seen = await ask(instance)
        await last.instances.shut_down(instance)
        run(["e2fsck", "-fn", instance.directory / "scratch"])
        await last.instances.destroy(instance.id)
    assert (seen["count"], seen["sum"], seen["last"]) == (10, sum(range(1, 11)), 10)
    assert seen["integrity"] == "ok"
