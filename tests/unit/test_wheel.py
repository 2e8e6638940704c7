"""The wheel: installed in a clean virtual environment, it runs without the checkout."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.wheel import ROOT
from torpor import __version__

if TYPE_CHECKING:
    from fixtures.wheel import Installed

pytestmark = pytest.mark.slow

SHOW = "import torpor, pathlib; print(pathlib.Path(torpor.__file__).parent)"

LIST = """
import importlib.metadata, json
print(json.dumps([(found.name, found.version) for found in importlib.metadata.distributions()]))
"""


def test_commands_run(installed: Installed) -> None:
    """`--version`, `--help`, `doctor --json` and `settings --json` work from the wheel."""
    assert installed.run("torpor", "--version").stdout.strip() == f"torpor {__version__}"
    assert "deploy" in installed.run("torpor", "--help").stdout
    findings = installed.run("torpor", "--home", installed.elsewhere / "home", "doctor", "--json")
    assert {"kernel", "qemu"} <= {row["name"] for row in json.loads(findings.stdout)}
    settings = installed.run("torpor", "settings", "--json")
    assert json.loads(settings.stdout)[0]["key"] == "home"


def test_nothing_comes_from_the_checkout(installed: Installed) -> None:
    """The package lies in the environment and finds neither the checkout nor test tools."""
    package = Path(installed.run("python", "-c", SHOW).stdout.strip())
    assert package.is_relative_to(installed.environment)
    found = installed.run("python", "-c", "import sys; print(sys.path)").stdout
    assert str(ROOT) not in found
    assert installed.run("python", "-c", "import pytest").returncode == 1


def test_files_are_those_of_the_source(installed: Installed) -> None:
    """Every file of src/torpor is in it, the guest's C sources too, byte for byte, and no other.

    So is the mark by which type checkers see the client's types (PEP 561).
    """
    package = Path(installed.run("python", "-c", SHOW).stdout.strip())
    source = ROOT / "src" / "torpor"
    assert contents(package) == contents(source)
    assert any(path.suffix == ".c" for path in contents(package))
    assert Path("py.typed") in contents(package)


def test_versions_are_the_locks(installed: Installed) -> None:
    """What it needs is installed in the versions of requirements.lock."""
    rows = installed.run("python", "-c", LIST).stdout
    lock = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE))
    for name, version in json.loads(rows):
        if name != "torpor":
            assert pins[re.sub(r"[-_.]+", "-", name).lower()] == version


def test_only_an_environment_is_replaced(tmp_path: Path) -> None:
    """`make-venv --into` refuses a directory that is something else, and leaves it as it is."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    command = [ROOT / "scripts" / "make-venv", "--into", tmp_path / "precious"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no virtual environment" in done.stderr
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def contents(directory: Path) -> dict[Path, bytes]:
    """Files below a directory, but for what Python makes of them."""
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
