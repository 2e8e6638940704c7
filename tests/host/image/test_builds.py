"""Builds from Debian packages: what they depend on, and what is left of those that were killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.own_hosts import outside
from torpor.errors import HostUnfit, NoSpace, ProgramFailed
from torpor.host.cancel import Cancelled, CancelToken, _token
from torpor.host.enclosure import run_enclosed
from torpor.host.process import ProcessId, find_processes_in, run
from torpor.host.tree import mounts_below, remove_tree
from torpor.image.library import ImageLibrary
from torpor.image.spec import ImageSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("network_of_the_host")]

PACKAGES = ("busybox-static",)
BUILD = """
import os, sys
from pathlib import Path
from torpor.image.library import ImageLibrary
from torpor.image.spec import ImageSpec
os.umask(int(sys.argv[2], 8))
said = lambda text: print("said", text, file=sys.stderr)
info = ImageLibrary(Path(sys.argv[1])).build(ImageSpec(packages=("busybox-static",)), progress=said)
print(info.digest)
"""
ELSEWHERE = {
    "LC_ALL": "tr_TR.UTF-8",
    "LANG": "de_DE",
    "TZ": "Pacific/Kiritimati",
    "HOME": "/nonexistent",
    "USER": "somebody",
    "TMPDIR": "/nonexistent",
    "DEB_BUILD_OPTIONS": "nodoc",
    "APT_CONFIG": "/nonexistent",
    "TAR_OPTIONS": "--owner=7",
}
POINTS = {
    "packages are unpacked": "mmdebstrap.*/usr/lib/x86_64-linux-gnu",
    "packages are configured": "mmdebstrap.*/etc/passwd",
    "the tar is written": "root.tar",
}


def start_build(library: Path, *, umask: str = "022", **environ: str) -> subprocess.Popen[str]:
    """A build in a process of its own, which prints the digest."""
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, library, umask],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
        cwd=library.parent,
    )


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the packages' image."""
    library = ImageLibrary(tmp_path_factory.mktemp("plain") / "lib")
    with outside():
        return library.build(ImageSpec(packages=PACKAGES), progress=lambda _: None).digest


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 40 MiB."""
    with tempfile.TemporaryDirectory() as name:
        run(["mount", "-t", "tmpfs", "-o", "size=40m", "torpor-test", name])
        try:
            yield Path(name)
        finally:
            run(["umount", name])


def test_image_does_not_depend_on_who_builds_it(tmp_path: Path, digest: str) -> None:
    """Another umask, locale, time zone, user and directory: the same bits. Builds do not wait for
    each other unless they make the same image of the same home, where the second finds it made."""
    builds = [
        start_build(tmp_path / "lib", umask="077", **ELSEWHERE),
        start_build(tmp_path / "lib", umask="000"),
    ]
    results = [(*build.communicate(timeout=200), build.returncode) for build in builds]
    assert [(out.strip(), code) for out, _, code in results] == [(digest, 0)] * 2, results
    assert sum(err.count("said building") for _, err, _ in results) == 1
    tree = tmp_path / "tree"
    run(["rdsquashfs", "-q", "-u", "/", "-p", tree, tmp_path / "lib" / f"{digest}.squashfs"])
    for of_the_host in ("etc/hostname", "etc/resolv.conf", "etc/apt/sources.list"):
        assert not (tree / of_the_host).exists()
    assert list((tree / "etc/apt/sources.list.d").iterdir()) == []


def wait_for(child: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Look until it is so; fails when the child ends before."""
    while not condition():
        assert child.poll() is None, child.communicate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.01)


def descendants(pid: int) -> list[ProcessId]:
    """All processes below `pid`."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found += [ProcessId.of(int(child)), *descendants(int(child))]
    return found


def has_content(root: Path, pattern: str) -> bool:
    """Whether a workspace has got as far as a directory or a file with something in it."""
    return any(path.is_dir() or path.stat().st_size for path in root.glob(f".building-*/{pattern}"))


def kill_build(build: subprocess.Popen[str], root: Path) -> list[ProcessId]:
    """SIGKILL the builder only; what it had started, all of it ended since."""
    below = descendants(build.pid)
    build.kill()
    build.communicate()
    late = find_processes_in(root.parent)
    assert all(process.wait(timeout_s=20) for process in [*below, *late])
    return below


@pytest.mark.parametrize("point", POINTS)
def test_killed_build_leaves_nothing(tmp_path: Path, point: str) -> None:
    """SIGKILL of the builder at any point: all of it ends, no mount was ever seen on the host, and
    opening the library removes its files."""
    root = tmp_path / "lib"
    build = start_build(root)
    try:
        wait_for(build, lambda: has_content(root, POINTS[point]))
        assert mounts_below(root.resolve()) == []
    finally:
        assert len(kill_build(build, root)) >= 2
    assert mounts_below(root.resolve()) == []
    library = ImageLibrary(root)
    assert library.list() == []
    assert [path.name for path in root.iterdir()] == ["recipes"]


def test_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of unpacking: the build is over and gone when the call ends."""
    root = tmp_path / "lib"
    library, token = ImageLibrary(root), CancelToken()
    outcome: list[BaseException] = []

    def build() -> None:
        _token.set(token)
        try:
            library.build(ImageSpec(packages=PACKAGES), progress=lambda _: None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    while thread.is_alive() and not any(root.glob(".building-*/mmdebstrap.*/usr")):
        thread.join(0.01)
    token.set()
    thread.join(60)
    token.close()
    assert [type(error) for error in outcome] == [Cancelled]
    assert [path.name for path in root.iterdir()] == ["recipes"]


def test_full_disk(disk: Path) -> None:
    """An image that does not fit is NoSpace, and its parts are gone."""
    library = ImageLibrary(disk / "lib")
    with pytest.raises(NoSpace):
        library.build(ImageSpec(packages=PACKAGES), progress=lambda _: None)
    assert [path.name for path in (disk / "lib").iterdir()] == ["recipes"]


def test_living_build_is_not_swept(tmp_path: Path) -> None:
    """Opening a library while a build is under way leaves the build alone; what older makers left
    goes."""
    root = tmp_path / "lib"
    ImageLibrary(root)
    (root / ".building-old" / "tree").mkdir(parents=True)
    (root / f"{'0' * 64}.json").write_text("{}")
    build = start_build(root)
    try:
        wait_for(build, lambda: any(root.glob(".building-*/mmdebstrap.*")))
        ImageLibrary(root)
        kept = [path.name for path in root.glob(".building-*/*")]
    finally:
        kill_build(build, root)
    assert len(kept) == 1
    assert not (root / ".building-old").exists()
    assert not list(root.glob("*.json"))


def test_enclosed_program_is_told_by_its_own_name() -> None:
    """Errors name the program, not what encloses it; its umask is 022, its mounts its own."""
    with pytest.raises(ProgramFailed, match=r"^sh exited with status 3: no luck$") as caught:
        run_enclosed(["sh", "-c", "echo no luck >&2; exit 3"])
    assert "unshare" not in caught.value.hint
    with pytest.raises(HostUnfit, match="no-such-program is not installed"):
        run_enclosed(["no-such-program"])
    before = os.umask(0o77)
    try:
        shown = run_enclosed(["sh", "-c", "umask; echo $$; mount -t tmpfs none /mnt"])
    finally:
        os.umask(before)
    assert shown.split() == ["0022", "1"]
    assert not os.path.ismount("/mnt")


def test_deletion_stays_in_its_tree(tmp_path: Path) -> None:
    """Mounts and links inside a tree go with it; what they show does not."""
    precious = tmp_path / "precious"
    (precious / "below").mkdir(parents=True)
    (precious / "file").write_text("keep")
    tree = tmp_path / "a tree"
    for name in ("bind", "over", "sub/proc"):
        (tree / name).mkdir(parents=True)
    (tree / "on-file").touch()
    (tree / "link").symlink_to(precious)
    (tree / "sub" / "link").symlink_to("../../precious/below")
    run(["mount", "--bind", precious, tree / "bind"])
    run(["mount", "-t", "tmpfs", "torpor-test", tree / "over"])
    (tree / "over" / "inner").mkdir()
    run(["mount", "--bind", precious, tree / "over" / "inner"])
    run(["mount", "--bind", precious / "file", tree / "on-file"])
    run(["mount", "-t", "proc", "proc", tree / "sub" / "proc"])
    assert len(mounts_below(tree)) == 5
    remove_tree(tree)
    assert not tree.exists()
    assert mounts_below(tree) == []
    assert sorted(path.name for path in precious.iterdir()) == ["below", "file"]
    assert (precious / "file").read_text() == "keep"
    remove_tree(tree)


def test_deletion_refuses_a_mount_and_a_link(tmp_path: Path) -> None:
    """A tree that is itself a mount, or a link to one, is not deleted."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    (tmp_path / "link").symlink_to(precious)
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        remove_tree(tmp_path / "link")
    (tmp_path / "bind").mkdir()
    run(["mount", "--bind", precious, tmp_path / "bind"])
    try:
        with pytest.raises(HostUnfit, match="something is mounted there"):
            remove_tree(tmp_path / "bind")
    finally:
        run(["umount", tmp_path / "bind"])
    assert (precious / "file").read_text() == "keep"
