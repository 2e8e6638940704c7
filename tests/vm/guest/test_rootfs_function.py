"""Functions on images of other kinds than Python packages: a directory, and the larger example."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import EXAMPLES, running
from fixtures.vms import make_images
from torpor.config import Settings
from torpor.errors import Conflict
from torpor.host.cancel import in_thread
from torpor.node.invoke import Request, send_request
from torpor.node.node import Node

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vm

FUNCTION = """\
name = "pages"
command = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]
cwd = "/"
memory = "96MiB"
files = [{ source = "extra", target = "/www/extra" }]

[image]
rootfs = "root"
warmup = ["/bin/sh", "-c", "cat /www/index.html"]

[[warmup]]
path = "/extra"
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A node of its own."""
    return Settings(home=tmp_path / "home", store=f"file://{tmp_path}/store")


def make_rootfs(directory: Path) -> Path:
    """A function on a root file system of one static program, links to it, and a page."""
    root = directory / "root"
    for name in ("bin", "www", "etc/torpor/wake.d"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for name in ("sh", "cat", "cp"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "bin" / "absolute").symlink_to("/bin/busybox")
    (root / "www" / "index.html").write_text("from the root file system\n")
    hook = root / "etc" / "torpor" / "wake.d" / "10-name"
    hook.write_text("#!/bin/sh\ncp /run/torpor/instance-id /www/id\n")
    hook.chmod(0o755)
    (directory / "extra").write_text("from the app\n")
    (directory / "function.toml").write_text(FUNCTION)
    return directory


async def test_function_on_a_rootfs_directory(settings: Settings, tmp_path: Path) -> None:
    """A directory as image: deployed, woken, answering from image, app and scratch; in use while a
    snapshot needs it, told by the snapshots' digests, removed after."""
    directory = tmp_path / "pages"
    directory.mkdir()
    async with Node.open(settings) as node:
        deployed = await node.deploy(make_rootfs(directory))
        async with running(node, "pages") as instance:
            answers = {}
            for path in ("/", "/extra", "/id"):
                response = await in_thread(
                    send_request, instance.address, 8080, Request(path=path), timeout_s=60
                )
                answers[path] = response.body.decode().strip()
        assert answers == {
            "/": "from the root file system",
            "/extra": "from the app",
            "/id": instance.id,
        }
        manifest = deployed.captured.snapshot.manifest
        assert manifest.function is not None
        for digest, users in ((manifest.image, 2), (manifest.function.app, 1)):
            with pytest.raises(Conflict) as refused:
                await node.remove_image(digest[:12])
            assert refused.value.reason.count(",") == users - 1
            assert deployed.captured.snapshot.digest[:12] in refused.value.reason
            assert node.parts.images.has(digest)
        again = await node.build_image(directory)
        assert again.digest == manifest.image


async def test_thumbs_makes_a_smaller_picture(deployed: Settings) -> None:
    """The example with Pillow: deployed from its directory, it resizes a posted picture."""
    await in_thread(make_images, "thumbs")
    async with Node.open(deployed) as node:
        await node.deploy(EXAMPLES / "thumbs")
        try:
            picture = await node.invoke("thumbs", Request(path="/example?size=200"))
            assert png_size(picture.response.body) == (200, 200)
            posted = Request("POST", "/?size=50", (), picture.response.body)
            smaller = await node.invoke("thumbs", posted)
            assert smaller.response.status == 200
            assert png_size(smaller.response.body) == (50, 50)
            refused = await node.invoke("thumbs", Request("POST", "/", (), b"no picture"))
            assert refused.response.status == 400
        finally:
            await node.remove_function("thumbs")


def png_size(picture: bytes) -> tuple[int, int]:
    """Width and height in a PNG's first chunk."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])
