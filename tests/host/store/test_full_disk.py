"""A file store on a disk that is full, which takes a file system of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.host

PROGRAM = """
import sys
from torpor.config import Settings
from torpor.errors import NoSpace
from torpor.store.stack import open_store

store = open_store(Settings(store=f"file://{sys.argv[1]}/store"))
for write in (
    lambda: store.put("packs/whole", bytes(8 << 20)),
    lambda: store.put_stream("packs/stream", iter([bytes(1 << 20)] * 8)),
):
    try:
        write()
    except NoSpace as error:
        print(error)
    print([info.key for info in store.list("")])
store.put("small", b"there is room again")
"""


def test_a_full_disk_is_no_space_at_once(tmp_path: Path) -> None:
    """A put and a stream end in NoSpace without repeats, nothing visible, and the room is free."""
    mounted = 'mount -t tmpfs -o size=3m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    words = ["unshare", "--mount", "sh", "-ec", mounted, "sh", str(tmp_path), sys.executable]
    result = subprocess.run([*words, PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[1::2] == ["[]", "[]"]
    for line, key in zip(lines[::2], ("whole", "stream"), strict=True):
        assert f"is full, packs/{key} could not be written" in line
        assert "No space left on device" in line
