"""What goes wrong is told clearly, with the right class, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from fixtures.failing_vmm import STEPS, failing
from fixtures.nodes import EXAMPLES, running, write_function
from torpor.errors import (
    Conflict,
    Damaged,
    FunctionFailed,
    GuestFailed,
    HostUnfit,
    Incompatible,
    InvalidInput,
    NoSpace,
    NotFound,
    TorporError,
    VmmFailed,
)
from torpor.host import frozen, pagemap
from torpor.host.process import run
from torpor.node.invoke import Request
from torpor.node.leftovers import find_leftovers
from torpor.node.node import Node
from torpor.snapshot.manifest import encode_manifest, manifest_digest
from torpor.vmm.qemu.driver import QemuDriver, QemuVmm

if TYPE_CHECKING:
    from torpor.config import Settings
    from torpor.snapshot.manifest import Manifest

pytestmark = pytest.mark.vm

FORGED = "forged"


@pytest.mark.parametrize(
    ("program", "extra", "words"),
    [
        ("import sys; sys.exit('no luck today')", "", "no luck today"),
        ("import time; time.sleep(999)", "", "listen"),
        (
            "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 8080));"
            " s.listen(); time.sleep(999)",
            "",
            "not on 0.0.0.0",
        ),
        (
            "import os, socket; s = socket.create_server(('', 8080)); c, _ = s.accept();"
            " print('dying now', flush=True); os.abort()",
            'warmup = [{ path = "/" }]',
            "dying now",
        ),
    ],
    ids=["exits at start", "never listens", "listens on loopback", "crashes at warm-up"],
)
async def test_function_that_does_not_work(
    node: Node, tmp_path: Path, program: str, extra: str, words: str
) -> None:
    """A function that exits, is deaf or crashes fails its deploy with its console's words."""
    directory = write_function(tmp_path / "broken", program, extra)
    settings = dataclasses.replace(node.parts.settings, start_timeout_s=8)
    impatient = Node(dataclasses.replace(node.parts, settings=settings))
    with pytest.raises(FunctionFailed) as caught:
        await impatient.deploy(directory)
    assert words in str(caught.value)
    assert find_leftovers(settings) == []
    assert node.parts.journal.ref("broken") is None


async def test_command_that_is_not_there(node: Node, tmp_path: Path) -> None:
    """A command that the image lacks is named."""
    directory = write_function(tmp_path / "broken", "")
    text = (directory / "function.toml").read_text().replace('"python3"', '"no-such-program"', 1)
    (directory / "function.toml").write_text(text)
    with pytest.raises(FunctionFailed, match=r"no-such-program|No such file"):
        await node.deploy(directory)
    assert find_leftovers(node.parts.settings) == []


@pytest.mark.parametrize("kill", [False, True], ids=["fails", "killed"])
@pytest.mark.parametrize("step", STEPS)
async def test_vmm_that_fails_at_each_step(
    request: pytest.FixtureRequest, step: str, kill: bool
) -> None:
    """Whatever step of a deploy QEMU fails or dies at: VmmFailed, and nothing is left.

    Failures meet the base that is being made, deaths the function where a base is there.
    """
    has_base = kill and step not in ("boot", "start")
    made = request.getfixturevalue("based_settings" if has_base else "imaged_settings")
    settings = dataclasses.replace(made, boot_timeout_s=30)
    driver = failing(QemuDriver(settings), step=step, kill=kill)
    async with Node.open(settings, driver=driver) as node:
        with pytest.raises(VmmFailed):
            await node.deploy(EXAMPLES / "hello")
        assert node.parts.journal.instances() == []
        assert find_leftovers(settings) == []


async def test_guest_that_stands_still(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A woken guest that does not answer in the time that boots have too fails its restore."""

    async def stay(vmm: QemuVmm) -> None:
        pass

    settings = dataclasses.replace(node.parts.settings, boot_timeout_s=2)
    impatient = Node(dataclasses.replace(node.parts, settings=settings))
    monkeypatch.setattr(QemuVmm, "_resume", stay)
    with pytest.raises(GuestFailed, match="did not answer within 2 s"):
        await impatient.restore("hello")
    assert node.parts.journal.instances() == []
    assert find_leftovers(settings) == []


async def test_qemu_that_is_missing(imaged_settings: Settings) -> None:
    """Without QEMU the error says what to install."""
    settings = dataclasses.replace(imaged_settings, qemu="qemu-that-is-not-there")
    async with Node.open(settings) as node:
        with pytest.raises(HostUnfit, match="qemu-that-is-not-there is not installed"):
            await node.deploy(EXAMPLES / "hello")
        assert find_leftovers(settings) == []


def altered(manifest: Manifest, **changes: object) -> Manifest:
    """The manifest with some fields of its platform changed."""
    platform = msgspec.structs.replace(manifest.platform, **changes)
    return msgspec.structs.replace(manifest, platform=platform)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vmm_version": "6.0"}, "vmm version is 6.0 in the snapshot"),
        ({"vmm": "firecracker"}, "vmm is firecracker"),
        ({"machine_type": "q35"}, "machine type is q35"),
        ({"cpu_model": "Skylake-Server"}, "cpu model is Skylake-Server"),
        ({"accelerator": "kvm"}, "accelerator is kvm"),
        ({"cpu_flags": ("amx-tile",)}, "amx-tile"),
        ({"architecture": "aarch64"}, "architecture is aarch64"),
        ({"page_bytes": 65536}, "page bytes is 65536"),
        ({"kernel": "0" * 64}, "kernel is 0000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_snapshot_of_another_platform(
    node: Node, change: dict[str, object], words: str
) -> None:
    """A snapshot that this host cannot run is refused before anything is made, with the reason."""
    digest = _forge(node, altered(_manifest(node), **change))
    with pytest.raises(Incompatible, match=words):
        await node.restore(digest)
    await node.remove_function(FORGED)
    assert node.parts.journal.instances() == []


async def test_snapshot_whose_image_is_not_here(node: Node) -> None:
    """A snapshot without its image is refused and the image named."""
    digest = _forge(node, msgspec.structs.replace(_manifest(node), image="1" * 64))
    with pytest.raises(Incompatible, match="image 111111111111 is not on this node"):
        await node.restore(digest)
    await node.remove_function(FORGED)


async def test_snapshot_of_another_memory_size(node: Node) -> None:
    """A machine of another size than the memory file is refused."""
    manifest = _manifest(node)
    machine = msgspec.structs.replace(manifest.machine, memory_bytes=512 * 2**20)
    digest = _forge(node, msgspec.structs.replace(manifest, machine=machine))
    with pytest.raises(Damaged, match="memory has 268435456 bytes, the machine needs 536870912"):
        await node.restore(digest)
    node.parts.journal.drop_ref(FORGED)
    run(["rm", "-r", node.parts.settings.home / "snapshots" / digest])


async def test_two_deploys_of_one_function(node: Node) -> None:
    """The second deploy while one runs is told so at once; the first one wins."""
    first, second = await asyncio.gather(
        node.deploy(EXAMPLES / "hello", name="twice"),
        node.deploy(EXAMPLES / "hello", name="twice"),
        return_exceptions=True,
    )
    results = [first, second]
    assert sum(isinstance(result, Conflict) for result in results) == 1
    assert sum(not isinstance(result, BaseException) for result in results) == 1
    await node.remove_function("twice")


async def test_two_invokes_at_once(node: Node) -> None:
    """Two commands that wake one function at the same time are both answered."""
    both = await asyncio.gather(*(node.invoke("hello", Request()) for _ in range(2)))
    assert [invoked.response.status for invoked in both] == [200, 200]
    assert both[0].instance_id != both[1].instance_id


async def test_full_disk(imaged_settings: Settings, tmp_path: Path) -> None:
    """On a full disk deploy and snapshot fail with an error and leave nothing."""
    home = tmp_path / "small"
    home.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", home])
    try:
        (home / "images").symlink_to(imaged_settings.home / "images")
        settings = dataclasses.replace(imaged_settings, home=home)
        async with Node.open(settings) as node:
            with pytest.raises(NoSpace, match="full"):
                await node.deploy(EXAMPLES / "hello")
            assert find_leftovers(settings) == []
    finally:
        run(["umount", home])


async def test_snapshot_on_a_full_disk_keeps_the_instance(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that finds no room costs nobody the instance."""
    async with running(node, "hello") as instance:
        real = pagemap.copy_written

        def copy_to_full_disk(
            pid: int, mapping: pagemap.Mapping, runs: list[tuple[int, int]], _: int
        ) -> None:
            with Path("/dev/full").open("wb", buffering=0) as full:
                real(pid, mapping, runs, full.fileno())

        monkeypatch.setattr(frozen, "_MOST_ROOM_BYTES", pagemap.PAGE_BYTES)  # of the room ahead
        monkeypatch.setattr(pagemap, "copy_written", copy_to_full_disk)
        with pytest.raises(TorporError, match="full"):
            await node.create_snapshot(instance.id, name="no-room")
        monkeypatch.undo()
        assert (await node.invoke("hello", Request())).instance_id == instance.id
    assert node.parts.journal.ref("no-room") is None


async def test_unknown_names(node: Node) -> None:
    """Unknown functions, instances and snapshots are NotFound; malformed names InvalidInput."""
    for work in (node.stop("nobody"), node.inspect("nothing"), node.remove_function("nope")):
        with pytest.raises(NotFound):
            await work
    with pytest.raises(InvalidInput):
        await node.remove_function("../../etc")


def _manifest(node: Node) -> Manifest:
    ref = node.parts.journal.ref("hello")
    assert ref is not None
    return node.parts.snapshots.get(ref.digest).manifest


def _forge(node: Node, manifest: Manifest) -> str:
    """A snapshot with another manifest over hello's files, named: a failed wake collects others."""
    ref = node.parts.journal.ref("hello")
    assert ref is not None
    encoded = encode_manifest(manifest)
    digest = manifest_digest(encoded)
    root = node.parts.settings.home / "snapshots"
    run(["cp", "-r", "--sparse=always", root / ref.digest, root / digest])
    (root / digest / "manifest.json").chmod(0o600)
    (root / digest / "manifest.json").write_bytes(encoded)
    node.parts.journal.set_ref(FORGED, digest)
    return digest
