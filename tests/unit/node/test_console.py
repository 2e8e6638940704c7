"""Following a console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.node.console import follow, read_tail

if TYPE_CHECKING:
    from pathlib import Path


async def test_lines_as_they_come(tmp_path: Path) -> None:
    """The last lines first, then each whole one; what comes before the end is not missed."""
    path = tmp_path / "console.log"
    path.write_bytes(b"one\r\ntwo\nthree\nfo")
    turns = [
        lambda: None,
        lambda: path.write_bytes(path.read_bytes() + b"ur\nfiv\xc3"),
        lambda: path.write_bytes(path.read_bytes() + b"\xb6e\n\nlast"),
    ]

    def lives() -> bool:
        turns.pop(0)()
        return bool(turns)

    lines = [line async for line in follow(path, 2, lives=lives)]
    assert lines == ["two", "three", "four", "fivöe", "", "last"]


async def test_console_that_is_not_there(tmp_path: Path) -> None:
    """No file: no lines, and an end when the instance ends."""
    answers = [True, False]
    found = [line async for line in follow(tmp_path / "no", 5, lives=lambda: answers.pop(0))]
    assert found == []
    assert read_tail(tmp_path / "no", 5) == ""
