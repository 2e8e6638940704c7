"""Named places in the work of a node where a test may have this process end or stand still.

Nobody else notices them: without TORPOR_BARRIER_FILE in the environment nothing happens there.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Final

_FILE: Final = os.environ.get("TORPOR_BARRIER_FILE", "")


def reach(place: str) -> None:
    """Die here by SIGKILL if the file of TORPOR_BARRIER_FILE holds this place's name; once.

    With `stop ` before the name: stand still by SIGSTOP, until SIGCONT. The file is removed first.
    Any thread.
    """
    if _FILE:
        _end_if_wanted(Path(_FILE), place)


def _end_if_wanted(file: Path, place: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        wanted = file.read_text()
        if wanted in (place, f"stop {place}"):
            file.unlink()
            os.kill(os.getpid(), signal.SIGKILL if wanted == place else signal.SIGSTOP)
