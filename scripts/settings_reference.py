"""Writes docs/settings.md from the one settings table, or checks that it is what would be written.

Run in the virtual environment: `.venv/bin/python scripts/settings_reference.py [--check]`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torpor.config import DEFAULT_FILE, Settings, describe_settings
from torpor.units import GiB, KiB, MiB

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = f"""\
# Settings

`make settings` writes this page from the table in `src/torpor/config.py`.

A setting's value is the last of: its default; the key in a TOML file (`--config FILE`, else
`TORPOR_CONFIG`, else `{DEFAULT_FILE}` if it is there); its environment variable; a flag of the
command, where `--help` shows one. An empty environment variable counts as none. An unknown key or a
value that does not parse is an error that names where it stands.

Sizes are written like `256MiB`, `64k` or `4096`, durations like `250ms`, `30s` or `5m`, in a TOML
file as strings or as plain numbers of bytes and seconds. `torpor settings` prints the values in
force, `torpor settings --json` as data; secrets are shown as `***`.

| key | environment | default | meaning |
|---|---|---|---|
"""


def write_page() -> str:
    """The whole page."""
    return HEAD + "".join(
        f"| `{row['key']}` | `{row['environment']}` | {_default(row)} | {_cell(row['help'])} |\n"
        for row in describe_settings(Settings())
    )


def _default(row: dict[str, str]) -> str:
    text = row["default"]
    if row["key"].endswith("_bytes"):
        text = _size(int(text))
    elif row["key"].endswith("_s"):
        text += "s"
    return f"`{text}`" if text else "empty"


def _size(size_bytes: int) -> str:
    for name, unit in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write the page, or with --check exit 1 if it is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if it differs")
    parser.add_argument("--page", type=Path, default=PAGE, help="instead of docs/settings.md")
    arguments = parser.parse_args()
    text = write_page()
    if not arguments.check:
        arguments.page.write_text(text)
    elif not arguments.page.exists() or arguments.page.read_text() != text:
        print(f"{arguments.page} is not up to date: run `make settings`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
