"""The log of keeper and pager: standard error, which is one file of both, kept short."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_LONGEST_BYTES: Final = 1 << 20
_FORM: Final = "%(asctime)s level=%(levelname)s pid=%(process)d logger=%(name)s %(message)s"


class BoundedLog(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard error, the file `path` opened for appending.

    When that is longer than `longest_bytes` it is moved to `<path>.1` and begun anew; a descriptor
    that other processes share cannot be replaced, so it is copied and cut.
    """

    def __init__(self, path: Path, *, longest_bytes: int = _LONGEST_BYTES) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORM))
        self._path = path
        self._longest_bytes = longest_bytes

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        with contextlib.suppress(OSError):  # gone, or the disk is full
            if os.stat(self._path).st_size > self._longest_bytes:
                shutil.copyfile(self._path, f"{self._path}.1")
                os.truncate(self._path, 0)
        super().emit(record)
