"""Whether a daemon runs: asked by each command, so it loads little."""

from __future__ import annotations

import socket
from pathlib import Path


def is_running(path: Path) -> bool:
    """Whether something listens on a Unix socket; a dead daemon's file is nothing. Blocking."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        try:
            asked.connect(str(path))
        except OSError:
            return False
    return True
