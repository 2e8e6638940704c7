"""Each place that the source names for killing is one where a suite does kill."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "torpor"
TESTS = ROOT / "tests"

DAEMON = ("chaos/test_killed_daemon.py", "contract/api/test_killed_uploads.py")
VMM = ("chaos/test_daemon_losses.py",)
PAGER = ("host/pager/test_deaths.py", "chaos/test_daemon_losses.py")

WITHOUT_A_VM = {
    *("instance recorded", "slot allocated", "vmm ended", "slot released"),
    *("function made", "function named", "instances stopped", "name dropped"),
    *("upload begun", "upload sent", "upload named", "deletion stored"),
    *("answer made", "answer kept"),
}
"""Where no VM that the operation works on runs: it did not begin yet, has ended, or has served."""


def words_in(path: Path) -> set[str]:
    """All constant strings of a Python file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def driven_by(*names: str) -> set[str]:
    """What test files name: `stop PLACE` has a process stand still there, `PLACE=FILE` end."""
    words = set().union(*(words_in(TESTS / name) for name in names))
    return words | {word.removeprefix("stop ").removesuffix("=") for word in words}


def places_of(*functions: str) -> set[str]:
    """The places that calls of these functions in the source name."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name(id=name) | ast.Attribute(attr=name),
                    args=[ast.Constant(value=str(place))],
                ) if name in functions:
                    found.add(place)
    return found


def test_every_place_of_the_daemon_is_driven() -> None:
    """The daemon is killed at each, and the VMM at each where the operation has one."""
    places = places_of("reach")
    assert len(places) > 20
    assert places - driven_by(*DAEMON) == set()
    assert places - WITHOUT_A_VM - driven_by(*VMM) == set()
    assert places >= WITHOUT_A_VM


def test_every_place_of_the_pager_is_driven() -> None:
    """The pager is killed at each, alone and under a daemon."""
    places = places_of("trace", "_trace")
    assert len(places) > 8
    for suite in PAGER:
        assert places - driven_by(suite) == set()
