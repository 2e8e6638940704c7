"""From the kernel as Debian packages it to the ELF file that Firecracker loads.

A bzImage holds the kernel compressed: offset and length of the payload are in its setup header
(Documentation/arch/x86/boot.rst in the kernel tree), and the payload's last four bytes are the size
of the content. Debian's cloud kernel is compressed as an LZ4 legacy stream
(doc/lz4_Frame_format.md in the lz4 tree): a magic number, then blocks of at most 8 MiB content,
each after its compressed size.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit

if TYPE_CHECKING:
    from pathlib import Path

ELF_MAGIC: Final = b"\x7fELF"
LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"

_SETUP_SECTORS_AT: Final = 0x1F1
_HEADER_AT: Final = 0x202
_PAYLOAD_AT: Final = 0x248
_SECTOR_BYTES: Final = 512
_BLOCK_BYTES: Final = 8 << 20
_LARGEST_BYTES: Final = 1 << 30
_OTHERS: Final = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x5d\x00\x00": "lzma",
    b"\x89LZO": "lzo",
}


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage. Takes seconds. Raises HostUnfit that says what it found."""
    payload = find_payload(bzimage)
    if payload.startswith(ELF_MAGIC):
        return payload
    if not payload.startswith(LZ4_LEGACY_MAGIC):
        names = (name for magic, name in _OTHERS.items() if payload.startswith(magic))
        found = next(names, repr(payload[:8]))
        raise HostUnfit(
            "the guest kernel is compressed in a way that torpor does not unpack",
            reason=f"{found} in place of LZ4",
        )
    stream, size_bytes = payload[:-4], struct.unpack("<I", payload[-4:])[0]
    if size_bytes > _LARGEST_BYTES:
        raise _damaged(f"a content of {size_bytes} bytes")
    kernel = unpack_lz4_legacy(stream)
    if len(kernel) != size_bytes:
        raise _damaged(f"{len(kernel)} bytes in place of {size_bytes}")
    if not kernel.startswith(ELF_MAGIC):
        raise HostUnfit("the guest kernel is no ELF file inside", reason=repr(kernel[:8]))
    return kernel


def find_payload(bzimage: bytes) -> bytes:
    """The compressed kernel. Raises HostUnfit when this is no bzImage of protocol 2.08 or later."""
    if bzimage[_HEADER_AT : _HEADER_AT + 4] != b"HdrS" or len(bzimage) < _PAYLOAD_AT + 8:
        raise HostUnfit("the guest kernel is no bzImage", reason=repr(bzimage[:8]))
    version = struct.unpack_from("<H", bzimage, _HEADER_AT + 4)[0]
    if version < 0x208:
        raise HostUnfit(f"the guest kernel has boot protocol {version:#x}, 0x208 is needed")
    sectors = bzimage[_SETUP_SECTORS_AT] or 4
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD_AT)
    begin = (sectors + 1) * _SECTOR_BYTES + offset
    if length < 8 or begin + length > len(bzimage):
        raise _damaged("the payload lies outside the file")
    return bzimage[begin : begin + length]


def unpack_lz4_legacy(stream: bytes) -> bytes:
    """The content of an LZ4 legacy stream. Raises HostUnfit when it is damaged."""
    content = bytearray()
    position = len(LZ4_LEGACY_MAGIC)
    while position < len(stream):
        if position + 4 > len(stream):
            raise _damaged("it ends inside a block's size")
        size = struct.unpack_from("<I", stream, position)[0]
        position += 4
        if not 0 < size <= len(stream) - position:
            raise _damaged(f"a block of {size} bytes")
        content += unpack_lz4_block(stream[position : position + size])
        position += size
    return bytes(content)


def unpack_lz4_block(block: bytes) -> bytearray:
    """The content of one LZ4 block (doc/lz4_Block_format.md). Raises HostUnfit."""
    try:
        return _unpack(block)
    except IndexError:
        raise _damaged("a block ends too early") from None


def _unpack(block: bytes) -> bytearray:
    out = bytearray()
    position, end = 0, len(block)
    while position < end:
        token = block[position]
        position += 1
        literals = token >> 4
        if literals == 15:
            literals, position = _extended(block, literals, position)
        if literals:
            if position + literals > end:
                raise IndexError
            out += block[position : position + literals]
            position += literals
        if position == end:  # the last sequence has no match
            return out
        distance = block[position] | block[position + 1] << 8
        position += 2
        length = (token & 15) + 4
        if length == 19:
            length, position = _extended(block, length, position)
        start = len(out) - distance
        if distance == 0 or start < 0:
            raise _damaged("a match before the block's beginning")
        if length <= distance:
            out += out[start : start + length]
        else:
            pattern = out[start:]
            out += (pattern * (length // distance + 1))[:length]
        if len(out) > _BLOCK_BYTES:
            raise _damaged("a block of more than 8 MiB")
    raise IndexError


def _extended(block: bytes, length: int, position: int) -> tuple[int, int]:
    while True:
        more = block[position]
        position += 1
        length += more
        if more != 255:
            return length, position


def write_vmlinux(bzimage: Path, target: Path) -> None:
    """Unpack a kernel file; `target` appears whole or not at all. Blocking. Raises HostUnfit."""
    temporary = target.with_name(f"install-{target.name}")
    temporary.write_bytes(extract_vmlinux(bzimage.read_bytes()))
    temporary.chmod(0o644)
    temporary.replace(target)


def _damaged(reason: str) -> HostUnfit:
    return HostUnfit(
        "the guest kernel cannot be unpacked", reason=reason, hint="run `torpor kernel install`"
    )
