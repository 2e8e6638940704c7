"""Windows: the 16 KiB units in which memory and disks are stored, sent and touched.

Window n of a file is its bytes from n * WINDOW_BYTES on; the last one may be shorter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WINDOW_BYTES: Final = 16 * 1024
_ZERO_WINDOW: Final = bytes(WINDOW_BYTES)


class Touched(msgspec.Struct, frozen=True, array_like=True):
    """Windows of one file, in the order of their first touch.

    `file` is `memory`, `image` or `app`.
    """

    file: str
    windows: tuple[int, ...]


def covering_windows(extents: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Numbers of the windows that (offset, length) extents touch, ascending, each once.

    The extents must ascend and not overlap.
    """
    last = -1
    for offset, length in extents:
        first = max(offset // WINDOW_BYTES, last + 1)
        end = -(-(offset + length) // WINDOW_BYTES)
        yield from range(first, end)
        last = max(last, end - 1)


def window_length(window: int, size_bytes: int) -> int:
    """Bytes of a window in a file of `size_bytes`; 0 behind its end."""
    return max(0, min(WINDOW_BYTES, size_bytes - window * WINDOW_BYTES))


def count_windows(size_bytes: int) -> int:
    """Windows in a file of `size_bytes`."""
    return -(-size_bytes // WINDOW_BYTES)


def is_zero(data: bytes | memoryview) -> bool:
    """Whether at most a window's bytes are all zero."""
    return data == _ZERO_WINDOW if len(data) == WINDOW_BYTES else not any(data)
