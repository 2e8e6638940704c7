"""Lint, types and the direction of imports are tests."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torpor import errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "torpor"
BIN = Path(sys.executable).parent

LEVELS = (
    {"errors"},
    {"units", "structs"},
    {"config"},
    {"host"},
    {"store"},
    {"snapshot"},
    {"vmm", "pager", "net", "image"},
    {"node"},
    {"gateway", "api"},
    {"bench"},
    {"cli"},
)
ASYNC_ROOMS = {"vmm", "node", "gateway", "api", "bench", "cli"}


def run_tool(*command: str) -> None:
    """Run a program of the virtual environment; its output is the failure."""
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_finds_nothing() -> None:
    """The rules of pyproject.toml hold in all Python files."""
    run_tool("ruff", "check", ".")


def test_format_is_ruffs() -> None:
    """All Python files are formatted by ruff."""
    run_tool("ruff", "format", "--check", ".")


def test_types_are_sound() -> None:
    """mypy --strict finds nothing in src."""
    run_tool("mypy")


SHELL = sorted(
    path
    for directory in ("scripts", "scripts/minio", ".ci")
    for path in (ROOT / directory).iterdir()
    if path.is_file() and path.read_text().startswith(("#!/bin/bash", "#!/bin/sh", "# shellcheck"))
)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_are_sound(path: Path) -> None:
    """shellcheck finds nothing, in what a script sources neither."""
    checker = shutil.which("shellcheck")
    assert checker, "there is no shellcheck; `make setup` installs it"
    command = [checker, "--external-sources", "--source-path=SCRIPTDIR", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def level_of(room: str) -> int:
    """Where a room is, counted from below; a new room must be put into LEVELS."""
    return next(number for number, rooms in enumerate(LEVELS) if room in rooms)


def imports_of(path: Path) -> set[str]:
    """The rooms that a module imports, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {
            name.split(".")[1]
            for name in names
            if name.startswith("torpor.") and not name.startswith("torpor.__")
        }
    return rooms


MODULES = sorted(
    path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem[0] != "_"
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """A module imports from its own room and from rooms below it, never beside or above."""
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for other in imports_of(path) - {room}:
        assert level_of(other) < level_of(room), f"{room} must not import {other}"


def test_rooms_below_the_node_block() -> None:
    """Only vmm, node and what is above it are asyncio; host.cancel is the bridge."""
    for path in MODULES:
        room = path.relative_to(SOURCE).parts[0]
        if room in ASYNC_ROOMS or path == SOURCE / "host" / "cancel.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.AsyncFunctionDef), path


def test_public_names_have_docstrings() -> None:
    """Every public module, class and function says what it is for."""
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in _public_definitions(tree):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def _public_definitions(
    tree: ast.Module | ast.ClassDef,
) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    found: list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_"):
                continue
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += _public_definitions(node)
    return found


def test_files_are_small_and_named_for_what_they_hold() -> None:
    """No module over 500 lines, none called utils or helpers."""
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 500, path
        assert path.stem not in ("utils", "helpers", "common", "misc"), path


def test_the_drawn_error_tree_is_the_real_one() -> None:
    """The tree in errors.py's docstring has each class below its parent, and no other."""
    drawn: dict[str, str] = {}
    parents = ["TorporError"]
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        if "── " not in line:
            continue
        depth = (line.index("── ") - 4) // 4 + 1
        name = line.split("── ")[1].split()[0]
        parents[depth:] = [name]
        drawn[name] = parents[depth - 1]
    real = {
        cls.__name__: cls.__mro__[1].__name__
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.TorporError)
        if cls is not errors.TorporError
    }
    assert drawn == real
