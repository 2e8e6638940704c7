"""The part of a kernel image that a restored VM gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from torpor.errors import HostUnfit
from torpor.vmm.qemu.kernel_head import write_kernel_head

if TYPE_CHECKING:
    from pathlib import Path


def make_image(sectors: int, path: Path) -> bytes:
    """A boot sector with the header's magic, and much behind it."""
    data = bytearray(b"k" * 200_000)
    data[0x1F1] = sectors
    data[0x202:0x206] = b"HdrS"
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize(("sectors", "kept"), [(0, 6), (1, 3), (31, 33), (255, 257)])
def test_boot_sector_setup_and_one_sector(tmp_path: Path, sectors: int, kept: int) -> None:
    """As many sectors of setup as the header says (0: four), one before and one behind them."""
    data = make_image(sectors, tmp_path / "kernel")
    write_kernel_head(tmp_path / "kernel", tmp_path / "head")
    assert (tmp_path / "head").read_bytes() == data[: kept * 512]


@pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(1000)])
def test_what_is_no_image(tmp_path: Path, data: bytes) -> None:
    """It is told, and nothing is written."""
    (tmp_path / "kernel").write_bytes(data)
    with pytest.raises(HostUnfit, match="is no kernel image"):
        write_kernel_head(tmp_path / "kernel", tmp_path / "head")
    assert not (tmp_path / "head").exists()
