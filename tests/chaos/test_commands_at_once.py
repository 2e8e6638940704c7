"""Commands of every kind on one home at the same time: each works or says who is in its way."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import end, journal_of, run_torpor, start, wait_until
from fixtures.nodes import EXAMPLES
from torpor.node.leftovers import find_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torpor.config import Settings

pytestmark = [pytest.mark.vm, pytest.mark.chaos]

DONE, NOT_FOUND, CONFLICT = 0, 3, 4


@pytest.fixture
def home(deployed: Settings) -> Iterator[Settings]:
    """The session's home with one function more, `shared`; no instance of it stays."""
    if journal_of(deployed).ref("shared") is None:
        run_torpor(deployed, "deploy", EXAMPLES / "hello", "--name", "shared")
    yield deployed
    for row in journal_of(deployed).instances():
        run_torpor(deployed, "stop", row.id)
    for name in ("aside", "aside-2"):
        if journal_of(deployed).ref(name) is not None:
            run_torpor(deployed, "snapshot", "rm", name)
    assert find_leftovers(deployed) == []


def wake(home: Settings) -> str:
    """A kept instance of `shared`."""
    return str(json.loads(run_torpor(home, "restore", "shared", "--json"))["instance"])


def revision(home: Settings) -> int:
    """The revision of `shared`."""
    rows = json.loads(run_torpor(home, "ls", "--json"))
    return next(int(row["revision"]) for row in rows if row["name"] == "shared")


def test_all_commands_on_one_function(home: Settings) -> None:
    """Everything at once: no traceback, no lost row, and every outcome is one that fits."""
    before = revision(home)
    first, second = wake(home), wake(home)
    lines = {
        ("ps",): {DONE},
        ("ls",): {DONE},
        ("image", "ls"): {DONE},
        ("net", "ls"): {DONE},
        ("snapshot", "ls"): {DONE},
        ("logs", first): {DONE, NOT_FOUND},
        ("snapshot", "inspect", "shared"): {DONE},
        ("snapshot", "verify", "shared"): {DONE},
        ("snapshot", "create", first, "--name", "aside"): {DONE, NOT_FOUND, CONFLICT},
        ("snapshot", "create", second, "--name", "aside-2"): {DONE},
        ("stop", first): {DONE},
        ("invoke", "hello"): {DONE},
        ("invoke", "shared", "--keep"): {DONE},
        ("restore", "shared"): {DONE},
        ("deploy", EXAMPLES / "hello", "--name", "shared"): {DONE},
    }
    commands = {line: start(home, *line) for line in lines}
    for line, command in commands.items():
        code, _, err = end(command)
        assert code in lines[line], (line, code, err)
    rows = {row.id: row for row in journal_of(home).instances()}
    assert first not in rows
    assert second in rows
    assert all(row.state == "running" and row.vmm and row.vmm.is_alive() for row in rows.values())
    assert len(json.loads(run_torpor(home, "ps", "--json"))) == len(rows)
    assert revision(home) == before + 1


REMOVALS = (("rm", "shared"), ("stop", "ID"), ("snapshot", "create", "ID", "--name", "aside"))


@pytest.mark.parametrize(
    ("one", "other"),
    list(itertools.combinations_with_replacement(REMOVALS, 2)),
    ids=lambda line: line[0],
)
def test_two_commands_on_one_instance(
    home: Settings, one: tuple[str, ...], other: tuple[str, ...]
) -> None:
    """Two commands that want the same instance: one at least succeeds, the other says why not."""
    instance = wake(home)
    pair = [
        start(home, *(instance if word == "ID" else word for word in line)) for line in (one, other)
    ]
    results = [end(command) for command in pair]
    assert any(code == DONE for code, _, _ in results), results
    assert all(code in (DONE, NOT_FOUND, CONFLICT) for code, _, _ in results), results
    left = [row.id for row in journal_of(home).instances()]
    removed = any(
        code == DONE and line[0] != "snapshot"
        for line, (code, _, _) in zip((one, other), results, strict=True)
    )
    assert left == ([] if removed else [instance])


def test_deploy_while_another_one_runs(home: Settings) -> None:
    """A second deploy of the same function is told at once; one of another function works."""
    first = start(home, "deploy", EXAMPLES / "hello", "--name", "shared")
    wait_until(lambda: journal_of(home).instances())
    second = start(home, "deploy", EXAMPLES / "hello", "--name", "shared")
    removal = start(home, "rm", "shared")
    elsewhere = start(home, "deploy", EXAMPLES / "hello", "--name", "elsewhere")
    for refused in (second, removal):
        code, _, err = end(refused)
        assert code == CONFLICT, err
        assert "another command is at work on function shared" in err
    assert end(elsewhere)[0] == DONE
    assert end(first)[0] == DONE
    assert run_torpor(home, "rm", "elsewhere") == "elsewhere\n"
