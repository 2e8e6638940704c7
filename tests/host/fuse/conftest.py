"""A mount, its holder, and the kernel's abilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.fuse_server import Holder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Mount = Callable[..., Holder]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount files of pattern, given as paths and sizes; nothing serves them yet."""
    holders: list[Holder] = []

    def make(files: dict[str, int], **options: int) -> Holder:
        holder = Holder(tmp_path / f"mount{len(holders)}", files, **options)
        holders.append(holder)
        return holder

    yield make
    for holder in holders:
        holder.close()


@pytest.fixture
def mount_with_resend(mount: Mount) -> Mount:
    """The same; skips where the kernel cannot send requests again."""

    def make(files: dict[str, int], **options: int) -> Holder:
        holder = mount(files, **options)
        if not holder.connection.negotiated.has_resend:
            pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")
        return holder

    return make
