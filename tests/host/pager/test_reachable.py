"""Who may reach a pager: the owner of its home alone, by a file that others cannot come to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from torpor.pager.control import SOCKET_NAME

if TYPE_CHECKING:
    from fixtures.pagers import PagerHome

pytestmark = pytest.mark.host

STRANGER = """
import json, os, socket, sys

os.setgroups([])
os.setgid(65534)
os.setuid(65534)

def tried(work):
    try:
        work()
    except OSError as error:
        return type(error).__name__
    return "reached"

def connect(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)

found = {path: tried(lambda: os.close(os.open(path, os.O_RDONLY))) for path in sys.argv[1:]}
found["connect"] = tried(lambda: connect("pager/control"))
print(json.dumps(found))
"""
"""A process of another user that is in the home already, whatever is above that."""


def sockets_of(pid: int) -> list[int]:
    """The inode numbers of the sockets that a process has open."""
    found = []
    for name in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(name)
        if target.startswith("socket:["):
            found.append(int(target.removeprefix("socket:[").removesuffix("]")))
    return found


def listed(pid: int, table: str, column: int) -> dict[int, str]:
    """/proc/PID/net/TABLE: the last column of each socket by its inode number."""
    lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return {int(row[column]): row[-1] for row in rows}


def test_no_network(home: PagerHome) -> None:
    """Pager and keeper have Unix sockets only, and those that have a name have it in a directory.

    No guest can reach that, nor what is in another network namespace or container.
    """
    home.publish()
    home.check("f", home.open())
    names: list[str] = []
    for who in ("pager", "keeper"):
        identity = home.places.identity(who)
        assert identity is not None
        unix = listed(identity.pid, "unix", 6)
        own = sockets_of(identity.pid)
        assert set(own) <= unix.keys(), "not a Unix socket"
        names += [unix[inode] for inode in own if "/" in unix[inode] or "@" in unix[inode]]
    assert len(names) >= 2, "pager and keeper both hold the listening socket"
    assert all(name.startswith("/") and name.endswith(f"/{SOCKET_NAME}") for name in names)


def test_no_other_user(home: PagerHome) -> None:
    """Another user comes neither to the socket nor to mount, cache or what is open.

    The files of the mount are to be read by all: a jailed VMM, which has some of them alone in
    its own tree, has a user of its own. What keeps others out is the directory above.
    """
    home.publish()
    served = home.open()
    home.check("f", served)
    root = home.settings.home.resolve()
    root.chmod(0o755)
    (root / "readable").touch(mode=0o644)
    paths = [
        *("pager", "pager/control", "pager/mount", "pager/open", "pager/log"),
        str(served.files["memory"].relative_to(root)),
        "cache/chunks",
    ]
    command = [sys.executable, "-c", STRANGER, ".", "readable", *paths]
    answer = subprocess.run(command, cwd=root, capture_output=True, check=True)
    (root / "readable").unlink()
    found = json.loads(answer.stdout)
    assert found.pop(".") == found.pop("readable") == "reached"
    assert found == dict.fromkeys([*paths, "connect"], "PermissionError")
    assert all((root / path).exists() for path in paths)
    assert home.client.counters()  # which this user gets
