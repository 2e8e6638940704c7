"""The command line as its users meet it: help, JSON, exit codes, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from fixtures.homes import Home
from torpor.cli.main import app

TORPOR = Path(sys.executable).with_name("torpor")


def commands() -> list[tuple[str, ...]]:
    """Every command, as words."""
    found: list[tuple[str, ...]] = []

    def walk(command: object, words: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(words)
            return
        for name, child in children.items():
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def help_of(words: tuple[str, ...]) -> str:
    """The text that a command's help begins with, and its options."""
    command: object = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    return str(command.help)  # type: ignore[attr-defined]


def torpor(*words: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """A torpor command on a home of its own."""
    return subprocess.run(
        [TORPOR, "--home", home, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_an_example(words: tuple[str, ...]) -> None:
    """Help ends with an example that names the command itself."""
    text = help_of(words)
    assert "Example: torpor " in text, text
    assert " ".join(words) in text.partition("Example: ")[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [("ls",), ("ps",), ("image", "ls"), ("snapshot", "ls"), ("net", "ls")],
    ids=" ".join,
)
def test_listings_of_an_empty_home(tmp_path: Path, words: tuple[str, ...]) -> None:
    """`--json` gives a list, before or after the command; people get words on standard error."""
    home = Home(tmp_path, "")
    for line in ((*words, "--json"), ("--json", *words)):
        answer = home.run(*line)
        assert answer.code == 0, answer.err
        assert isinstance(json.loads(answer.out), list)
    answer = home.run(*words)
    assert answer.code == 0
    assert answer.out.strip() or answer.err.startswith("no ")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("invoke", "nobody"), 3, "nobody"),
        (("rm", "nobody"), 3, "there is no function 'nobody'"),
        (("stop", "nobody"), 3, "there is no instance 'nobody'"),
        (("logs", "nobody"), 3, "there is no instance 'nobody'"),
        (("snapshot", "inspect", "nobody"), 3, "there is no snapshot 'nobody'"),
        (("snapshot", "rm", "nobody"), 3, "there is no snapshot 'nobody'"),
        (("snapshot", "push", "nobody"), 3, "there is no snapshot 'nobody'"),
        (("image", "rm", "ffff"), 3, "there is no image 'ffff'"),
        (("deploy", "/nonexistent"), 2, "there is no /nonexistent/function.toml"),
        (("net", "check", "nobody"), 3, "there is no instance 'nobody'"),
        (("net", "check", "--log-line", "nonsense"), 2, ""),
        (("--store", "gopher://x", "snapshot", "pull", "x"), 2, "gopher"),
        (("no-such-command",), 2, "No such command"),
        (("bench", "speed"), 2, "paging, crowd, gateway"),
        (("bench", "push", "--minio", "/nowhere"), 11, "make setup-test"),
        (("bench", "pull", "--memory", "much"), 2, "not a size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors(tmp_path: Path, words: tuple[str, ...], code: int, text: str) -> None:
    """Exit code and words of what users get wrong; nothing on standard output."""
    answer = Home(tmp_path, "").run(*words)
    assert answer.code == code, answer.err
    assert text in answer.err
    assert answer.out == ""
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("rm", "nobody"), 3, "there is no function 'nobody'"),
        (("no-such-command",), 2, "No such command"),
        (("net", "check", "--log-line", "nonsense"), 2, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_of_the_program(
    tmp_path: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    """The same of a process of its own: what the commands above end with is what a shell sees."""
    answer = torpor(*words, home=tmp_path)
    assert answer.returncode == code, answer.stderr
    assert text in answer.stderr
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr


def test_error_as_json(tmp_path: Path) -> None:
    """With `--json` an error is one object with class, message, reason, hint and exit code."""
    answer = torpor("rm", "nobody", "--json", home=tmp_path)
    error = json.loads(answer.stderr)
    assert error["error"] == "NotFound"
    assert error["exit_code"] == answer.returncode == 3
    assert error["hint"]


def test_settings_are_listed_with_their_sources(tmp_path: Path) -> None:
    """`torpor settings` shows what is in force."""
    answer = torpor("settings", "--json", home=tmp_path)
    rows = {row["key"]: row for row in json.loads(answer.stdout)}
    assert rows["home"]["value"] == str(tmp_path)
    assert rows["store"]["environment"] == "TORPOR_STORE"
