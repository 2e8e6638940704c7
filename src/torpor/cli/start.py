"""The entry point of the `torpor` program."""

from __future__ import annotations

import sys

from torpor.cli.interrupt import INTERRUPTED, listen


def run() -> None:
    """Run the command line; an interruption while its modules are still loading is quiet too."""
    listen()
    try:
        from torpor.cli.main import app

        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
