"""`torpor key`: made once, shown without showing it, rotated without losing anything."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from fixtures.homes import Home

if TYPE_CHECKING:
    from pathlib import Path

SECRET = re.compile(r"torpor-key-1:[0-9a-f]{64}")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that is not there yet."""
    return Home(tmp_path / "home", "")


def test_init(home: Home) -> None:
    """The key is in a file for its owner alone, below a home for its owner alone."""
    made = home.run("key", "init", "--json").json()
    path = home.path / "key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert home.path.stat().st_mode & 0o777 == 0o700
    assert made["source"] == str(path)
    assert [key["use"] for key in made["keys"]] == ["write and read"]


def test_init_keeps_a_key_that_is_there(home: Home) -> None:
    """A second init is refused and changes nothing."""
    home.run("key", "init")
    before = (home.path / "key").read_bytes()
    answer = home.run("key", "init")
    assert answer.code == 4
    assert "there is a key" in answer.err
    assert (home.path / "key").read_bytes() == before


@pytest.mark.parametrize("words", [(), ("--json",)], ids=["table", "json"])
def test_show_shows_ids_and_no_key(home: Home, words: tuple[str, ...]) -> None:
    """The key itself is printed with --reveal alone."""
    home.run("key", "init")
    for command in ("init", "show", "rotate"):
        answer = home.run("key", command, *words)
        assert not SECRET.search(answer.out + answer.err)
    shown = home.run("key", "show", "--reveal", *words)
    assert len(SECRET.findall(shown.out)) == 2


def test_rotate(home: Home) -> None:
    """The new key comes first, the old one stays to read, and the consequences are said."""
    first = home.run("key", "init", "--json").json()["keys"]
    answer = home.run("key", "rotate")
    assert answer.code == 0
    assert "old snapshots stay readable" in answer.err
    assert "shares no chunk" in answer.err
    keys = home.run("key", "show", "--json").json()["keys"]
    assert [key["use"] for key in keys] == ["write and read", "read"]
    assert keys[1]["id"] == first[0]["id"]
    assert keys[0]["id"] != first[0]["id"]
    assert (home.path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", ["show", "rotate"])
def test_without_a_key(home: Home, command: str) -> None:
    """What needs a key says how to make one."""
    answer = home.run("key", command)
    assert answer.code == 3
    assert "torpor key init" in answer.err


@pytest.mark.parametrize("command", ["show", "rotate"])
def test_key_that_others_can_read(home: Home, command: str) -> None:
    """Such a file protects nothing and is refused."""
    home.run("key", "init")
    (home.path / "key").chmod(0o640)
    answer = home.run("key", command)
    assert answer.code == 2
    assert "others can read" in answer.err


def test_key_file(home: Home, tmp_path: Path) -> None:
    """--key-file names another place than home."""
    path = tmp_path / "keys" / "mine"
    assert home.run("key", "init", "--key-file", path).code == 0
    assert not (home.path / "key").exists()
    assert home.run("key", "show", "--key-file", path, "--json").json()["source"] == str(path)


def test_environment_wins(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """TORPOR_KEY is used instead of a file; nobody rotates a file that is not used."""
    home.run("key", "init")
    secret = home.run("key", "show", "--reveal", "--json").json()["keys"][0]["key"]
    home.run("key", "rotate")
    monkeypatch.setenv("TORPOR_KEY", secret)
    shown = home.run("key", "show", "--json")
    assert [key["use"] for key in shown.json()["keys"]] == ["write and read"]
    assert "TORPOR_KEY" in shown.json()["source"]
    assert "is not used" in shown.err
    for command in ("init", "rotate"):
        answer = home.run("key", command)
        assert answer.code == 4
        assert "TORPOR_KEY" in answer.err


def test_not_a_key(home: Home) -> None:
    """A malformed file is named with the line, and what is in it is not printed."""
    home.run("key", "init")
    path = home.path / "key"
    path.write_text("# mine\ntorpor-key-1:1234secret\n")
    answer = home.run("key", "show")
    assert answer.code == 2
    assert f"line 2 of {path}" in answer.err
    assert "1234secret" not in answer.err
