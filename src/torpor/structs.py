"""Decoding into msgspec's structs in several threads.

msgspec builds what it has to know of a struct type when it is first decoded, and other threads see
it half built: version 0.22 then ends the process with a segmentation fault. Whoever decodes a
struct says `type=prepared(...)`.
"""

from __future__ import annotations

import threading
from typing import Any, Final, TypeVar

import msgspec

T = TypeVar("T")

_lock: Final = threading.Lock()
_prepared: Final[set[Any]] = set()


def prepared(as_type: type[T]) -> type[T]:
    """The type itself, once all that msgspec needs to decode it is there. Any thread."""
    if as_type not in _prepared:
        with _lock:
            msgspec.json.Decoder(as_type)  # keeps it with the type and with those in it
            _prepared.add(as_type)
    return as_type
