"""`torpor snapshot push` and `pull` between two homes, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import assert_same

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.homes import Furnished, Home


pytestmark = pytest.mark.slow


def test_push_and_pull(a: Furnished, b: Home) -> None:
    """A snapshot arrives as it was, under its name, with its images; an app as an app."""
    pushed = a.home.run("snapshot", "push", "saved", "--json").json()
    assert pushed["snapshot"] == a.saved.digest
    assert pushed["key"] == a.home.run("key", "show", "--json").json()["keys"][0]["id"]
    pulled = b.run("snapshot", "pull", "saved", "--json").json()
    assert pulled["snapshot"] == a.saved.digest
    assert pulled["moved_bytes"] > 0
    assert_same(b.snapshots.get(a.saved.digest), a.saved)
    assert b.run("snapshot", "inspect", "saved", "--json").json()["names"] == ["saved"]
    kinds = {info.digest: info.kind for info in b.images.list()}
    assert kinds == {a.image: "image", a.apps["f"]: "app"}


def test_push_under_another_name(a: Furnished, b: Home) -> None:
    """--name is the name in the store; the node's own names stay."""
    assert a.home.run("snapshot", "push", "f", "--name", "prod").code == 0
    assert [ref["name"] for ref in a.home.run("store", "ls", "--json").json()] == ["prod"]
    assert b.run("snapshot", "pull", "f").code == 3
    assert b.run("snapshot", "pull", "prod").code == 0
    assert a.home.run("snapshot", "inspect", "f", "--json").json()["names"] == ["f"]


def test_by_digest(a: Furnished, b: Home) -> None:
    """A snapshot without a name of its own is pushed by digest with --name, and pulled by it."""
    a.home.journal.set_ref("keep", a.saved.digest)
    assert a.home.run("snapshot", "push", a.saved.digest[:10], "--name", "s").code == 0
    assert b.run("snapshot", "pull", a.saved.digest).code == 0
    assert b.run("snapshot", "ls", "--json").json()[0]["names"] == []
    assert b.run("snapshot", "verify", a.saved.digest).code == 0


def test_base_has_no_function(a: Furnished) -> None:
    """A base is not pushed by itself: it goes along with functions."""
    answer = a.home.run("snapshot", "push", a.base.digest, "--name", "x")
    assert answer.code == 2
    assert "is a base" in answer.err


def test_no_key_asks_for_a_decision(a: Furnished, stranger: Home) -> None:
    """Without a key nothing goes to a store: a key, or --plain, is for the user to choose."""
    (a.home.path / "key").unlink()
    answer = a.home.run("snapshot", "push", "f")
    assert answer.code == 2
    assert "there is no key" in answer.err
    assert "--plain" in answer.err
    assert stranger.run("store", "ls", "--json").json() == []


def test_plain_is_said(a: Furnished, stranger: Home) -> None:
    """A plain push is called so by push, `store ls` and inspect."""
    pushed = a.home.run("snapshot", "push", "f", "--plain")
    assert "PLAIN" in pushed.out
    assert "PLAIN" in stranger.run("store", "ls").out
    assert "PLAIN" in stranger.run("snapshot", "inspect", "f", "--remote").out
    shown = stranger.run("snapshot", "inspect", "f", "--remote", "--json").json()
    assert shown["plain"]
    assert shown["key"] is None


def test_plain_is_taken_by_decision_alone(a: Furnished, b: Home) -> None:
    """Who has a key takes nothing that is not sealed unless told so."""
    a.home.run("snapshot", "push", "f", "--plain")
    answer = b.run("snapshot", "pull", "f")
    assert answer.code == 33
    assert "refs/f is not sealed" in answer.err
    assert b.files() == []
    assert b.run("snapshot", "pull", "f", "--plain").code == 0
    assert_same(b.snapshots.get(a.f.digest), a.f)


def test_sealed_needs_the_key(a: Furnished, stranger: Home) -> None:
    """Another key opens nothing; both keys are named."""
    a.home.run("snapshot", "push", "f")
    stranger.run("key", "init")
    ids = [home.run("key", "show", "--json").json()["keys"][0]["id"] for home in (a.home, stranger)]
    answer = stranger.run("snapshot", "pull", "f")
    assert answer.code == 33
    assert all(key_id in answer.err for key_id in ids)
    assert stranger.files() == []


def test_expected_digest(a: Furnished, b: Home) -> None:
    """A ref that was moved, or put back, is refused by who says which snapshot it wants."""
    a.home.run("snapshot", "push", "f", "--name", "x")
    answer = b.run("snapshot", "pull", "x", "--expect-digest", a.g.digest)
    assert answer.code == 4
    assert a.f.digest[:12] in answer.err
    assert b.files() == []
    assert b.run("snapshot", "pull", "x", "--expect-digest", a.f.digest).code == 0
    restored = b.run("restore", "x", "--expect-digest", a.g.digest)
    assert restored.code == 4
    assert f"x on this node is snapshot {a.f.digest[:12]}" in restored.err
    assert b.run("snapshot", "pull", "x", "--expect-digest", "12").code == 2


def test_whole_files(a: Furnished, b: Home) -> None:
    """The whole-file way stays reachable, and says that it is plain."""
    pushed = a.home.run("snapshot", "push", "f", "--transfer", "whole")
    assert "PLAIN" in pushed.out
    assert b.run("snapshot", "pull", "f").code == 3
    assert b.run("snapshot", "pull", "f", "--transfer", "whole").code == 0
    assert_same(b.snapshots.get(a.f.digest), a.f)
    assert a.home.run("snapshot", "push", "f", "--transfer", "carrier-pigeon").code == 2


def test_progress(a: Furnished) -> None:
    """Without a terminal: one line a phase with bytes and rate; nothing with --json."""
    answer = a.home.run("snapshot", "push", "f")
    lines = answer.err.splitlines()
    for phase in ("base memory", "function memory", "function disk"):
        assert len([line for line in lines if line.startswith(f"{phase}: ")]) == 1, answer.err
    assert all("KiB in" in line and "/s" in line for line in lines if "memory" in line)
    assert a.home.run("snapshot", "push", "g", "--json").err == ""


def test_rotated_key_shares_nothing(a: Furnished, b: Home) -> None:
    """After a rotation everything is sent anew; who has only the new key reads the new alone."""
    first = a.home.run("snapshot", "push", "f", "--json").json()
    a.home.run("key", "rotate")
    second = a.home.run("snapshot", "push", "f", "--name", "f2", "--json").json()
    assert second["moved_bytes"] > 0.9 * first["moved_bytes"]
    newest = a.home.run("key", "show", "--reveal", "--json").json()["keys"][0]["key"]
    (b.path / "key").write_text(f"{newest}\n")
    assert b.run("snapshot", "pull", "f").code == 33
    assert b.run("snapshot", "pull", "f2").code == 0
    assert a.home.run("snapshot", "inspect", "f", "--remote").code == 0


@pytest.mark.parametrize("digits", ["", "zz"])
def test_what_is_no_digest(a: Furnished, digits: str, tmp_path: Path) -> None:
    """A reference that means nothing here is not found."""
    assert a.home.run("snapshot", "export", f"nobody{digits}", tmp_path / "x.tar").code == 3
    assert not (tmp_path / "x.tar").exists()
