"""Files for an instance's disks that have no content yet: the scratch disk and the empty app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torpor.host.process import run

if TYPE_CHECKING:
    from pathlib import Path

_UUID: Final = "746f7270-6f72-4000-8000-000000000001"


def make_scratch(path: Path, size_bytes: int) -> None:
    """A sparse ext4 disk, the same bit for bit for equal sizes. Raises ProgramFailed.

    UUID, hash seed and times are fixed (mke2fs(8); E2FSPROGS_FAKE_TIME is e2fsprogs' own hook for
    reproducible images); inode tables and journal stay holes.
    """
    make_empty_app(path, size_bytes)
    features = f"lazy_itable_init=1,lazy_journal_init=1,nodiscard,hash_seed={_UUID}"
    run(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-J", "size=4"),
            *("-U", _UUID, "-E", features, path),
        ],
        env={"E2FSPROGS_FAKE_TIME": "1"},
        timeout_s=60,
    )


def make_empty_app(path: Path, capacity_bytes: int) -> None:
    """The placeholder for an app disk while there is no function: zeros, all of them a hole."""
    with path.open("wb") as stream:
        stream.truncate(capacity_bytes)
