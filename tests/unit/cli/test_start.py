"""What a command loads before it does anything: each module costs every call of the program."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIST = """
import sys
from torpor.cli.start import run
sys.argv = ["torpor", "--home", sys.argv[1], "ps"]
try:
    run()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
OF_THE_DAEMON_ALONE = {"fastapi", "httpx", "matplotlib", "opentelemetry", "pydantic", "uvicorn"}


def test_what_a_listing_loads(tmp_path: Path) -> None:
    """Nothing that only the daemon, its clients or plots need."""
    listing = subprocess.run(
        [sys.executable, "-c", LIST, tmp_path / "home"], capture_output=True, text=True, check=True
    )
    loaded = set(listing.stderr.split())
    assert "typer" in loaded
    assert not loaded & OF_THE_DAEMON_ALONE
