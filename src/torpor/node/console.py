"""What an instance's console printed: its last lines, and what it prints from now on."""

from __future__ import annotations

import asyncio
import codecs
import os
from typing import TYPE_CHECKING, Final

from torpor.host.cancel import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

_TAIL_BYTES: Final = 64 * 1024
_LOOK_AGAIN_S: Final = 0.2


def read_tail(path: Path, lines: int) -> str:
    """The last lines of a log, empty when there is none. Blocking."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.replace("\r", "").strip().splitlines()[-lines:])


async def follow(path: Path, lines: int, *, lives: Callable[[], bool]) -> AsyncIterator[str]:
    """The last lines of a log, then each line that is added, until `lives` says that all ended.

    `lives` is blocking and called in a thread, before each look: what was printed before the end
    is not missed. A line that is not ended yet is kept back until it is, or until the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, offset = "", 0
    first = True
    while True:
        goes_on = await in_thread(lives)
        data = await in_thread(_read_from, path, offset)
        offset += len(data)
        text += decoder.decode(data).replace("\r", "")
        *whole, text = text.split("\n")
        for line in whole[-lines:] if first else whole:
            yield line
        first = False
        if not goes_on:
            if text:
                yield text
            return
        await asyncio.sleep(_LOOK_AGAIN_S)


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read()
    except FileNotFoundError:
        return b""
