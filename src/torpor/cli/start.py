"""The entry point of the `torpor` program."""

from __future__ import annotations

from torpor.cli.early import listen


def run() -> None:
    """Run the command line; it can be interrupted while its modules are still loading."""
    listen()
    from torpor.cli.main import app

    app()
