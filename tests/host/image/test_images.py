"""Images, apps and disks: the same bit for bit, and refused with reasons."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import blake3
import pytest

from torpor.errors import Damaged, InvalidInput, NotFound
from torpor.host.process import run
from torpor.image.library import ImageLibrary
from torpor.image.scratch import make_scratch
from torpor.image.spec import AppFile, FunctionSpec, ImageSpec
from torpor.units import Digest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("network_of_the_host")]

APP_BYTES = 1 << 20


def silent(_: str) -> None:
    """Progress that nobody sees."""


def make_tree(root: Path, *, names: list[str]) -> Path:
    """A root file system whose files were made in the order of `names`."""
    root.mkdir()
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n")
        os.utime(path, (len(str(root)) * 1000.5, 99))
    (root / "link").symlink_to("bin/tool")
    (root / "bin" / "tool").chmod(0o755)
    return root


def spec_of(source: Path) -> FunctionSpec:
    """A function with one file."""
    file = AppFile(source, PurePosixPath("/app/main.py"))
    return FunctionSpec(
        name="echo", command=("x",), image=ImageSpec(rootfs=source.parent), files=(file,)
    )


def test_image_of_a_directory_is_reproducible(tmp_path: Path) -> None:
    """Two trees with equal content give one digest, whatever their times and order of making."""
    names = ["bin/tool", "etc/conf", "var/data"]
    first = make_tree(tmp_path / "a", names=names)
    second = make_tree(tmp_path / "other-place", names=names[::-1])
    one = ImageLibrary(tmp_path / "lib1").build(ImageSpec(rootfs=first), progress=silent)
    two = ImageLibrary(tmp_path / "lib2").build(ImageSpec(rootfs=second), progress=silent)
    assert one.digest == two.digest
    (second / "etc" / "conf").write_text("changed\n")
    three = ImageLibrary(tmp_path / "lib2").build(ImageSpec(rootfs=second), progress=silent)
    assert three.digest != one.digest


def test_app_does_not_depend_on_umask_or_owner(tmp_path: Path) -> None:
    """An app is its files and their executable bits, nothing of who built it."""
    library = ImageLibrary(tmp_path / "lib")
    source = tmp_path / "main.py"
    source.write_text("print()\n")
    source.chmod(0o640)
    first = library.build_app(spec_of(source), capacity_bytes=APP_BYTES)
    source.chmod(0o604)
    os.chown(source, 1000, 1000)
    second = library.build_app(spec_of(source), capacity_bytes=APP_BYTES)
    assert first.digest == second.digest
    assert library.path(first.digest).stat().st_size == APP_BYTES
    source.chmod(0o755)
    third = library.build_app(spec_of(source), capacity_bytes=APP_BYTES)
    assert third.digest != first.digest


def test_app_that_is_too_large(tmp_path: Path) -> None:
    """An app above the capacity is refused with both sizes and nothing is kept of it."""
    library = ImageLibrary(tmp_path / "lib")
    source = tmp_path / "big.bin"
    source.write_bytes(os.urandom(2 * APP_BYTES))
    with pytest.raises(InvalidInput, match="an app disk has"):
        library.build_app(spec_of(source), capacity_bytes=APP_BYTES)
    assert library.list() == []
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["recipes"]


def test_package_that_does_not_exist(tmp_path: Path) -> None:
    """A package that Debian lacks is named, and nothing is kept of the build."""
    library = ImageLibrary(tmp_path / "lib")
    spec = ImageSpec(packages=("torpor-no-such-package",))
    with pytest.raises(InvalidInput, match="there is no Debian package 'torpor-no-such-package'"):
        library.build(spec, progress=silent)
    assert library.list() == []
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["recipes"]


def test_image_that_came_damaged(tmp_path: Path) -> None:
    """A file that is not what its digest says is not adopted."""
    library = ImageLibrary(tmp_path / "lib")
    arrived = tmp_path / "arrived"
    arrived.write_bytes(b"something")
    with pytest.raises(Damaged, match="is damaged"):
        library.adopt(arrived, Digest("0" * 64))
    digest = Digest(blake3.blake3(b"something").hexdigest())
    library.adopt(arrived, digest)
    assert library.get(digest[:8]).digest == digest
    library.remove(digest)
    with pytest.raises(NotFound):
        library.get(digest)


def test_scratch_disk_is_reproducible_and_clean(tmp_path: Path) -> None:
    """Two scratch disks are equal, sound and mostly holes."""
    for name in ("one", "two"):
        make_scratch(tmp_path / name, 64 << 20)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    run(["e2fsck", "-fn", tmp_path / "one"])
    assert (tmp_path / "one").stat().st_blocks * 512 < 8 << 20


def test_image_is_not_built_twice(tmp_path: Path) -> None:
    """The same directory packed again is the same image, listed once."""
    library = ImageLibrary(tmp_path / "lib")
    tree = make_tree(tmp_path / "tree", names=["bin/tool"])
    first = library.build(ImageSpec(rootfs=tree), progress=silent)
    again = library.build(replace(ImageSpec(), rootfs=tree), progress=silent)
    assert first == again
    assert len(library.list()) == 1


def test_files_that_changed_since_they_were_read(tmp_path: Path) -> None:
    """An app whose file is gone, or would be written through a link, is refused with the reason."""
    library = ImageLibrary(tmp_path / "lib")
    source = tmp_path / "home" / "main.py"
    source.parent.mkdir()
    source.write_text("print()\n")
    spec = spec_of(source)
    gone = replace(spec, files=(AppFile(source.with_name("gone"), PurePosixPath("/app/gone")),))
    with pytest.raises(InvalidInput, match="cannot be put to /app/gone"):
        library.build_app(gone, capacity_bytes=APP_BYTES)
    links = tmp_path / "home" / "links"
    links.mkdir()
    (links / "out").symlink_to("../..")
    through = (
        AppFile(links, PurePosixPath("/app")),
        AppFile(source, PurePosixPath("/app/out/main.py")),
    )
    with pytest.raises(InvalidInput, match="a link leads out of the app"):
        library.build_app(replace(spec, files=through), capacity_bytes=APP_BYTES)
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["recipes"]
