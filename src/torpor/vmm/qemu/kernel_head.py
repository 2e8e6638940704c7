"""The head of a kernel image: all that QEMU needs of one for a VM that is only restored.

QEMU's board wants a kernel, reads it whole into memory of its own, and a guest that comes from a
snapshot never looks at it: 16 MB of private memory a clone, with the initramfs. Source: Linux'
Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit

if TYPE_CHECKING:
    from pathlib import Path

_SETUP_SECTORS_AT: Final = 0x1F1
_SETUP_SECTORS_OF_OLD: Final = 4
_MAGIC_AT: Final = 0x202
_MAGIC: Final = b"HdrS"
_SECTOR_BYTES: Final = 512
_LONGEST_BYTES: Final = (1 + 255 + 1) * _SECTOR_BYTES


def write_kernel_head(kernel: Path, target: Path) -> None:
    """Write boot sector, setup code and one sector of the kernel proper. Blocking.

    Raises HostUnfit for what is no bzImage.
    """
    with kernel.open("rb", buffering=0) as stream:
        begin = stream.read(_LONGEST_BYTES)
    if begin[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        raise HostUnfit(
            f"{kernel} is no kernel image", hint="`torpor kernel install` makes it anew"
        )
    setup_sectors = begin[_SETUP_SECTORS_AT] or _SETUP_SECTORS_OF_OLD
    target.write_bytes(begin[: (1 + setup_sectors + 1) * _SECTOR_BYTES])
