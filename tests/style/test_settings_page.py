"""docs/settings.md is the settings table."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from torpor.config import Settings, load_settings

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "settings_reference.py"
PAGE = ROOT / "docs" / "settings.md"


def check(page: Path) -> subprocess.CompletedProcess[str]:
    """The script's judgement of a page."""
    command = [sys.executable, str(SCRIPT), "--check", "--page", str(page)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_page_is_up_to_date() -> None:
    """docs/settings.md is what the settings table gives."""
    result = check(PAGE)
    assert result.returncode == 0, result.stderr


def test_page_that_is_behind_is_noticed(tmp_path: Path) -> None:
    """A page that lacks a setting, and one that is not there, are told with what to do."""
    behind = tmp_path / "settings.md"
    lines = PAGE.read_text().splitlines(keepends=True)
    behind.write_text("".join(line for line in lines if "`lazy`" not in line))
    for page in (behind, tmp_path / "absent.md"):
        result = check(page)
        assert result.returncode == 1
        assert "make settings" in result.stderr


def test_defaults_are_written_as_they_are_read() -> None:
    """Every default on the page, given in the environment, is the default."""
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (?:`(.*?)`|empty) \|", PAGE.read_text(), re.M)
    assert [key for key, _, _ in rows] == [row.name for row in fields(Settings)]
    environ = {name: default for _, name, default in rows if default}
    assert load_settings(environ=environ, file=Path("/dev/null")) == Settings()
