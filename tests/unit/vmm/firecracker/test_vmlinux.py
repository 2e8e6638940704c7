"""Unpacking the kernel: LZ4 blocks, bzImages, and everything that is neither."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.config import Settings
from torpor.errors import HostUnfit
from torpor.image.kernel import load_boot
from torpor.image.vmlinux import (
    LZ4_LEGACY_MAGIC,
    extract_vmlinux,
    unpack_lz4_block,
    unpack_lz4_legacy,
    write_vmlinux,
)

if TYPE_CHECKING:
    from pathlib import Path

ELF = b"\x7fELF" + bytes(range(200))


def literals(data: bytes) -> bytes:
    """An LZ4 block of literals alone."""
    if len(data) < 15:
        return bytes([len(data) << 4]) + data
    rest, more = divmod(len(data) - 15, 255)
    return b"\xf0" + b"\xff" * rest + bytes([more]) + data


def stream(*blocks: bytes) -> bytes:
    """A legacy stream."""
    return LZ4_LEGACY_MAGIC + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def bzimage(payload: bytes, *, version: int = 0x20F, magic: bytes = b"HdrS") -> bytes:
    """A kernel file with this payload, one setup sector."""
    head = bytearray(2 * 512)
    head[0x1F1] = 1
    head[0x202:0x206] = magic
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 16, len(payload))
    return bytes(head) + bytes(16) + payload


def packed(content: bytes) -> bytes:
    """A payload as the kernel's build makes it."""
    return stream(literals(content)) + struct.pack("<I", len(content))


def test_blocks() -> None:
    """Literals, a match, one that overlaps itself, long lengths."""
    assert unpack_lz4_block(literals(b"abc")) == b"abc"
    assert unpack_lz4_block(literals(b"x" * 1000)) == b"x" * 1000
    # "abcdef", then 8 from 6 back ("abcdefab"), then the literal "Z"
    assert unpack_lz4_block(b"\x64abcdef\x06\x00" + b"\x10Z") == b"abcdefabcdefabZ"
    # "ab", then 19 + 255 + 3 from 1 back, then nothing
    assert unpack_lz4_block(b"\x2fab\x01\x00\xff\x03" + b"\x00") == b"ab" + b"b" * 277
    assert unpack_lz4_legacy(stream(literals(b"one"), literals(b"two"))) == b"onetwo"


def test_kernel(tmp_path: Path) -> None:
    """The ELF file inside, written whole; a kernel that is not compressed is taken as it is."""
    assert extract_vmlinux(bzimage(packed(ELF))) == ELF
    assert extract_vmlinux(bzimage(ELF)) == ELF
    (tmp_path / "vmlinuz").write_bytes(bzimage(packed(ELF)))
    write_vmlinux(tmp_path / "vmlinuz", tmp_path / "vmlinux")
    assert (tmp_path / "vmlinux").read_bytes() == ELF
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vmlinux", "vmlinuz"]


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (b"", "is no bzImage"),
        (b"\x7fELF" * 300, "is no bzImage"),
        (bzimage(packed(ELF), magic=b"none"), "is no bzImage"),
        (bzimage(packed(ELF), version=0x207), "boot protocol 0x207"),
        (bzimage(packed(ELF))[:-1], "outside the file"),
        (bzimage(b"\x1f\x8b" + bytes(50)), "gzip in place of LZ4"),
        (bzimage(b"\x28\xb5\x2f\xfd" + bytes(50)), "zstd in place of LZ4"),
        (bzimage(b"\xfd7zXZ" + bytes(50)), "xz in place of LZ4"),
        (bzimage(b"unknown" + bytes(50)), "in place of LZ4"),
        (bzimage(packed(b"no ELF at all")), "is no ELF file inside"),
        (bzimage(packed(ELF)[:-4] + b"\0\0\0\0"), "204 bytes in place of 0"),
        (bzimage(packed(ELF)[:-4] + b"\xff\xff\xff\xff"), "content of 4294967295 bytes"),
        (bzimage(stream(literals(ELF))[:-9] + bytes(4)), "a block of"),
        (bzimage(stream(b"\x10") + bytes(4)), "ends too early"),
        (bzimage(stream(b"\x14a\x09\x00\x00") + bytes(4)), "before the block's beginning"),
        (bzimage(stream(b"\x14a\x00\x00\x00") + bytes(4)), "before the block's beginning"),
    ],
)
def test_wrong_kernels(tmp_path: Path, kernel: bytes, words: str) -> None:
    """Each is refused by what it is, and no file is left."""
    (tmp_path / "vmlinuz").write_bytes(kernel)
    with pytest.raises(HostUnfit, match=words):
        write_vmlinux(tmp_path / "vmlinuz", tmp_path / "vmlinux")
    assert [path.name for path in tmp_path.iterdir()] == ["vmlinuz"]


def test_bombs_end() -> None:
    """A block that claims endless matches is refused at 8 MiB."""
    with pytest.raises(HostUnfit, match="more than 8 MiB"):
        unpack_lz4_block(b"\x1fa\x01\x00" + b"\xff" * 40_000 + b"\x00" + b"\x00")


@given(st.binary(max_size=300))
def test_any_bytes_are_unpacked_or_refused(data: bytes) -> None:
    """No other error than HostUnfit, whatever comes."""
    for read in (unpack_lz4_block, unpack_lz4_legacy, extract_vmlinux):
        with contextlib.suppress(HostUnfit):
            read(data)  # type: ignore[operator]


def test_debians_kernel() -> None:
    """The installed cloud kernel has its ELF file beside it: x86-64, entered at 16 MiB."""
    boot = load_boot(Settings().boot_dir)
    with boot.vmlinux.open("rb") as file:
        head = file.read(64)
    assert head[:5] == b"\x7fELF\x02"
    assert struct.unpack_from("<H", head, 18)[0] == 62
    assert struct.unpack_from("<Q", head, 24)[0] == 0x1000000
