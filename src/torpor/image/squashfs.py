"""Trees and tar streams to squashfs, the same bit for bit wherever it is done.

tar2sqfs(1) writes what it reads in order, so the tar is sorted; owners, times and device numbers
are fixed. Blocks are 32 KiB of LZ4: a guest under emulation decompresses them about as fast as it
reads, and a page fault reads little.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from torpor.host.enclosure import run_enclosed

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC: Final = b"hsqs"
_SUPERBLOCK: Final = struct.Struct("<4s36xQ")
_DEVICE_BLOCK_BYTES: Final = 4096

_TAR_FLAGS: Final = (
    *("--sort=name", "--format=posix", "--numeric-owner", "--mtime=@0", "--one-file-system"),
    "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
    *("--xattrs", "--xattrs-include=*"),
)
_SQUASHFS_FLAGS: Final = (
    *(
        "--compressor",
        "lz4",
        "--block-size",
        "32768",
        "--defaults",
        "uid=0,gid=0,mode=0755,mtime=0",
    ),
    *("--num-jobs", "2", "--quiet", "--force"),
)


def tree_to_squashfs(tree: Path, target: Path, *, owner: str | None = None) -> None:
    """Pack a directory. `owner` like `0:0` overrides all owners. Raises ProgramFailed."""
    tar = target.with_suffix(".tar")
    uid, _, gid = (owner or "").partition(":")
    owners = [f"--owner={uid}", f"--group={gid}"] if owner else []
    try:
        run_enclosed(["tar", "-C", tree, *_TAR_FLAGS, *owners, "-cf", tar, "."])
        tar_to_squashfs(tar, target)
    finally:
        tar.unlink(missing_ok=True)


def is_padded(path: Path) -> bool:
    """Whether a squashfs ends before its file does, as an app's on a disk of fixed capacity.

    The superblock's field bytes_used (squashfs format 4.0, byte 40) tells where; tools pad to the
    4 KiB of a device block themselves. False for what is no squashfs.
    """
    with path.open("rb") as stream:
        superblock = stream.read(_SUPERBLOCK.size)
    if len(superblock) < _SUPERBLOCK.size:
        return False
    magic, bytes_used = _SUPERBLOCK.unpack(superblock)
    return bool(magic == _MAGIC and path.stat().st_size >= bytes_used + _DEVICE_BLOCK_BYTES)


def tar_to_squashfs(tar: Path, target: Path) -> None:
    """Pack a tar archive in its own order. Raises ProgramFailed."""
    run_enclosed(["sh", "-c", 'exec tar2sqfs "$@" <"$0"', tar, *_SQUASHFS_FLAGS, target])
