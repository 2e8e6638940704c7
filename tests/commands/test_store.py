"""`torpor store`, and what `snapshot inspect` and `verify` say of the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fixtures.homes import Furnished, Home


pytestmark = pytest.mark.slow


@pytest.fixture
def pushed(a: Furnished) -> Furnished:
    """Home A after it pushed `f` and `saved`."""
    for name in ("f", "saved"):
        assert a.home.run("snapshot", "push", name).code == 0
    return a


def objects(home: Home, kind: str) -> list[Path]:
    """The objects of a kind in the store, as files."""
    return sorted(path for path in Path(home.store[7:], kind).rglob("*") if path.is_file())


def test_ls(pushed: Furnished) -> None:
    """Every name with its snapshot and the key that seals it."""
    key = pushed.home.run("key", "show", "--json").json()["keys"][0]["id"]
    rows = pushed.home.run("store", "ls", "--json").json()
    assert [(row["name"], row["snapshot"], row["key"], row["plain"]) for row in rows] == [
        ("f", pushed.f.digest, key, False),
        ("saved", pushed.saved.digest, key, False),
    ]
    assert key in pushed.home.run("store", "ls").out


def test_ls_of_others(pushed: Furnished, stranger: Home) -> None:
    """What cannot be opened is listed with the reason, what is plain as that."""
    stranger.run("key", "init")
    pushed.home.run("snapshot", "push", "g", "--plain")
    rows = {row["name"]: row for row in stranger.run("store", "ls", "--json").json()}
    assert "is sealed with key" in rows["f"]["problem"]
    assert rows["f"]["snapshot"] is None
    assert rows["g"]["plain"]
    assert not rows["f"]["plain"]


def test_needs_no_home(pushed: Furnished, stranger: Home) -> None:
    """A store can be looked after from a machine that never ran a node."""
    key = pushed.home.path / "key"
    stranger.path.rmdir()
    for words in (("ls",), ("stat",), ("check", "--read-data"), ("gc",)):
        assert stranger.run("store", *words, "--key-file", key, "--json").code == 0
    assert not stranger.path.exists()


def test_inspect_remote(pushed: Furnished, b: Home) -> None:
    """Sizes by file, sealed and not, and what the base has of them."""
    shown = b.run("snapshot", "inspect", "f", "--remote", "--json").json()
    assert shown["snapshot"] == pushed.f.digest
    assert shown["base"] == pushed.base.digest
    assert shown["function"] == "f"
    assert not shown["plain"]
    files = {file["name"].split()[0]: file for file in shown["files"]}
    assert set(files) == {"memory", "disk", "image", "app"}
    memory = files["memory"]
    assert 0 < memory["shared_windows"] < memory["windows"]
    assert 0 < memory["shared_bytes"] < memory["stored_bytes"]
    assert memory["content_bytes"] == memory["windows"] * 16384
    assert files["app"]["size_bytes"] == 2000 + 16384
    assert shown["wake_bytes"] > 0
    text = b.run("snapshot", "inspect", pushed.f.digest, "--remote").out
    assert f"with key {shown['key']}" in text
    assert b.run("snapshot", "inspect", "nobody", "--remote").code == 3


def test_verify_remote(pushed: Furnished, b: Home, stranger: Home) -> None:
    """Every chunk that a name needs is read and opened; without the key it says so."""
    found = b.run("snapshot", "verify", "f", "--remote", "--json").json()
    assert found["snapshot"] == pushed.f.digest
    assert found["read_bytes"] > 0
    assert found["problems"] == []
    assert b.run("snapshot", "verify", "nobody", "--remote").code == 3
    assert stranger.run("snapshot", "verify", "f", "--remote").code == 33
    assert b.files() == []


def test_verify_remote_finds_damage(pushed: Furnished, b: Home) -> None:
    """One flipped bit in a pack, and one missing record: the objects are named."""
    pack = max(objects(b, "packs"), key=lambda path: path.stat().st_size)
    flip(pack, pack.stat().st_size // 2)
    answer = b.run("snapshot", "verify", "f", "--remote")
    assert answer.code == 31
    assert f"packs/{pack.name}" in answer.err
    for image in objects(b, "images"):
        image.unlink()
    answer = b.run("snapshot", "verify", "f", "--remote")
    assert answer.code == 31
    assert "images/" in answer.err


def test_check(pushed: Furnished) -> None:
    """A sound store: exit code 0; a flipped bit is found by --read-data, with exit code 1."""
    checked = pushed.home.run("store", "check", "--json").json()
    assert checked["refs"] == 2
    assert checked["read_bytes"] == 0
    pack = max(objects(pushed.home, "packs"), key=lambda path: path.stat().st_size)
    flip(pack, pack.stat().st_size // 2)
    assert pushed.home.run("store", "check").code == 0
    answer = pushed.home.run("store", "check", "--read-data", "--json")
    assert answer.code == 1
    assert [problem["key"] for problem in answer.json()["problems"]] == [f"packs/{pack.name}"]
    answer = pushed.home.run("store", "check", "--read-data")
    assert answer.code == 1
    assert pack.name in answer.out
    assert "data: " in answer.err


def test_check_without_the_key(pushed: Furnished, stranger: Home) -> None:
    """What nobody here can open is a problem, not a pass."""
    assert stranger.run("store", "check").code == 1


def test_stat(pushed: Furnished) -> None:
    """What two snapshots share is counted once, and as shared with each."""
    found = pushed.home.run("store", "stat", "--json").json()
    assert found["logical_bytes"] > found["unique_bytes"] > 0
    assert found["compressed_bytes"] <= found["objects"]["packs"]
    refs = {ref["name"]: ref for ref in found["refs"]}
    assert set(refs) == {"f", "saved"}
    assert all(ref["shared_bytes"] > 0 and ref["own_bytes"] > 0 for ref in refs.values())
    own = sum(ref["own_bytes"] for ref in refs.values())
    assert own + refs["f"]["shared_bytes"] == found["compressed_bytes"]
    text = pushed.home.run("store", "stat").out
    assert all(word in text for word in ("logical", "unique", "compressed", "SHARED"))


def test_rm_and_gc(pushed: Furnished, b: Home) -> None:
    """What only a removed name needed is found, kept for the grace period, and then deleted."""
    home = pushed.home
    assert home.run("store", "rm", "saved").code == 0
    assert home.run("store", "rm", "saved").code == 3
    before = objects(home, "snapshots")
    planned = home.run("store", "gc", "--grace", "0s", "--dry-run", "--json").json()
    assert planned["dry_run"]
    assert planned["deleted"] > 0
    assert objects(home, "snapshots") == before
    waiting = home.run("store", "gc", "--json").json()
    assert (waiting["deleted"], waiting["condemned"]) == (0, 0)  # it is younger than the grace
    done = home.run("store", "gc", "--grace", "0s", "--json").json()
    assert done["deleted"] == planned["deleted"]
    assert len(objects(home, "snapshots")) < len(before)
    assert home.run("store", "check", "--read-data").code == 0
    assert b.run("snapshot", "pull", "f").code == 0
    assert b.run("snapshot", "pull", "saved").code == 3


@pytest.mark.parametrize("grace", ["soon", "-1d", ""])
def test_bad_grace(pushed: Furnished, grace: str) -> None:
    """A grace period that is none is refused before anything is looked at."""
    answer = pushed.home.run("store", "gc", f"--grace={grace}")
    assert answer.code == 2
    assert "not a duration" in answer.err


def test_gc_without_all_keys(pushed: Furnished, stranger: Home) -> None:
    """Who cannot read every name deletes nothing: what the others need is not known."""
    before = objects(pushed.home, "packs")
    answer = stranger.run("store", "gc", "--grace", "0s")
    assert answer.code == 33
    assert objects(pushed.home, "packs") == before


def flip(path: Path, place: int) -> None:
    """Change one bit of an object."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
