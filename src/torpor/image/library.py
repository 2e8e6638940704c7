"""The images and apps of one node: squashfs files named by their BLAKE3 digest.

    ROOT/<digest>.squashfs   ROOT/<digest>.json   ROOT/recipes/<key>   ROOT/.building-*/

A recipe is what an image is made of; its key leads to the digest, so that nothing is built twice.
Everything is made in a workspace, appears by rename and is never written again. Opening a library
removes what makers that were killed left in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING, Final, Literal

import blake3
import msgspec

from torpor.errors import Conflict, Damaged, InvalidInput, NoSpace, NotFound, ProgramFailed
from torpor.host.lock import exclusive
from torpor.host.sparse import blake3_file
from torpor.image.app import lay_out
from torpor.image.packages import apt_sources, debian_suite, packages_to_tar
from torpor.image.squashfs import is_padded, tar_to_squashfs, tree_to_squashfs
from torpor.image.workspace import sweep_workspaces, workspace
from torpor.structs import prepared
from torpor.units import Digest, format_size, parse_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torpor.image.spec import FunctionSpec, ImageSpec

_BUILDER: Final = 2
"""Counts up when the same recipe would give other bytes."""
_BUILD_WAIT_S: Final = 900.0
_CHANGE_WAIT_S: Final = 30.0


class ImageInfo(msgspec.Struct, frozen=True):
    """An image or app on this node. `digest` is BLAKE3 of the file, padding of an app included."""

    digest: Digest
    kind: Literal["image", "app"]
    size_bytes: int
    created_ns: int
    made_of: str


class ImageLibrary:
    """Images below one directory. Blocking; safe from any number of processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._recipes = root / "recipes"
        self._recipes.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def build(
        self, spec: ImageSpec, *, progress: Callable[[str], None], rebuild: bool = False
    ) -> ImageInfo:
        """The image for a recipe, built if it is not there or `rebuild`.

        Raises InvalidInput for a package that does not exist, ProgramFailed, NoSpace, Conflict.
        """
        if spec.rootfs is not None:
            return self._build_rootfs(spec.rootfs, progress)
        sources = [path.read_text() for path in apt_sources()]
        key = _key("packages", debian_suite(), *spec.packages, *sources)
        with self._building(key):
            known = self._known(key)
            if known is not None and not rebuild:
                return known
            progress(f"building the image of {', '.join(spec.packages)} (takes a minute)")
            with self._workspace() as work:
                packages_to_tar(spec.packages, work / "root.tar", suite=debian_suite())
                tar_to_squashfs(work / "root.tar", work / "image.squashfs")
                info = self._publish(work / "image.squashfs", "image", " ".join(spec.packages))
                self._remember(key, info.digest, work)
            return info

    def build_app(self, spec: FunctionSpec, *, capacity_bytes: int) -> ImageInfo:
        """The app of a function: its files, padded with a hole to `capacity_bytes`.

        Raises InvalidInput when the files need more, or are not as they were when read.
        """
        with self._workspace() as work:
            tree = work / "tree"
            (tree / "app").mkdir(parents=True)
            lay_out(spec.files, tree)
            target = work / "app.squashfs"
            tree_to_squashfs(tree, target, owner="0:0")
            size_bytes = target.stat().st_size
            if size_bytes > capacity_bytes:
                raise InvalidInput(
                    f"the files of {spec.name} need {format_size(size_bytes)}, an app disk has"
                    f" {format_size(capacity_bytes)}",
                    hint="raise app_bytes, or put large files into the image",
                )
            os.truncate(target, capacity_bytes)
            return self._publish(target, "app", spec.name)

    def get(self, prefix: str) -> ImageInfo:
        """An image by digest or its beginning. Raises NotFound, Conflict for several."""
        found = [info for info in self.list() if info.digest.startswith(prefix)]
        if len(found) > 1:
            raise Conflict(f"{prefix!r} fits {len(found)} images", hint="give more digits")
        if not found or not prefix:
            raise NotFound(
                f"there is no image {prefix!r} on this node", hint="`torpor image ls` lists them"
            )
        return found[0]

    def has(self, digest: str) -> bool:
        """Whether the image is on this node."""
        return self._path(digest).exists()

    def path(self, digest: str) -> Path:
        """The file of an image. Raises NotFound."""
        if not self.has(digest):
            raise NotFound(f"image {digest[:12]} is not on this node")
        return self._path(digest)

    def list(self) -> list[ImageInfo]:
        """All images and apps, oldest first."""
        found = []
        for path in self._root.glob("*.json"):
            with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
                info = msgspec.json.decode(path.read_bytes(), type=prepared(ImageInfo))
                if self.has(info.digest):
                    found.append(info)
        return sorted(found, key=lambda info: info.created_ns)

    def remove(self, digest: str) -> None:
        """Delete an image; VMs that use it go on. Raises NotFound."""
        with self._changing():
            self.path(digest).unlink()
            self._info_path(digest).unlink(missing_ok=True)

    def adopt(self, path: Path, digest: Digest) -> None:
        """Take over a file that came from elsewhere. Raises Damaged when it is another one."""
        if blake3_file(path) != parse_digest(digest):
            raise Damaged(f"image {digest[:12]} is damaged", reason="its digest is another")
        self._publish(path, "app" if is_padded(path) else "image", "pulled")

    def _build_rootfs(self, rootfs: Path, progress: Callable[[str], None]) -> ImageInfo:
        progress(f"packing {rootfs}")
        with self._workspace() as work:
            tree_to_squashfs(rootfs, work / "image.squashfs")
            return self._publish(work / "image.squashfs", "image", str(rootfs))

    def _publish(self, path: Path, kind: Literal["image", "app"], made_of: str) -> ImageInfo:
        """Give a file that is ready its place; `path` is in a workspace or somebody's staging."""
        digest = blake3_file(path)
        info = ImageInfo(digest, kind, path.stat().st_size, time.time_ns(), made_of)
        described = path.with_suffix(".json")
        with _space_watched():
            described.write_bytes(msgspec.json.encode(info))
        with self._changing():
            if self.has(digest):
                described.unlink()
                return msgspec.json.decode(
                    self._info_path(digest).read_bytes(), type=prepared(ImageInfo)
                )
            path.chmod(0o444)
            described.rename(self._info_path(digest))
            path.rename(self._path(digest))
        return info

    def _sweep(self) -> None:
        sweep_workspaces(self._root)
        with self._changing():
            for path in self._root.glob("*.json"):
                if not self.has(path.stem):
                    path.unlink()

    def _known(self, key: str) -> ImageInfo | None:
        try:
            return self.get((self._recipes / key).read_text())
        except (FileNotFoundError, NotFound):
            return None

    def _remember(self, key: str, digest: Digest, work: Path) -> None:
        (work / "recipe").write_text(digest)
        (work / "recipe").rename(self._recipes / key)

    def _path(self, digest: str) -> Path:
        return self._root / f"{digest}.squashfs"

    def _info_path(self, digest: str) -> Path:
        return self._root / f"{digest}.json"

    @contextlib.contextmanager
    def _building(self, key: str) -> Iterator[None]:
        """One build of a recipe at a time; who waits finds it built."""
        lock = self._recipes / f"{key}.lock"
        with exclusive(lock, timeout_s=_BUILD_WAIT_S, what="this image"):
            yield

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Held while a file and its description come or go, which are two steps."""
        lock = self._recipes / "library.lock"
        with exclusive(lock, timeout_s=_CHANGE_WAIT_S, what="the images of this home"):
            yield

    @contextlib.contextmanager
    def _workspace(self) -> Iterator[Path]:
        with _space_watched(), workspace(self._root) as work:
            yield work


@contextlib.contextmanager
def _space_watched() -> Iterator[None]:
    """NoSpace in place of a full disk's many faces."""
    try:
        yield
    except (OSError, ProgramFailed) as error:
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise NoSpace(
            "the disk is full: the image could not be made",
            reason=str(error),
            hint="free some space, or use another --home",
        ) from None


def _key(*parts: str) -> str:
    encoded = msgspec.json.encode([_BUILDER, *parts])
    return blake3.blake3(encoded).hexdigest()
