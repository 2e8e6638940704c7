"""`torpor snapshot gc`: what is on a node for nothing goes, and nothing else."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

from torpor.snapshot.manifest import manifest_digest

if TYPE_CHECKING:
    from fixtures.homes import Furnished, Home
    from torpor.snapshot.local import LocalSnapshot


def deleted(home: Home, *words: str) -> dict[str, str]:
    """Digest -> kind of what a collection deletes."""
    found = home.run("snapshot", "gc", *words, "--json").json()["deleted"]
    return {item["digest"]: item["kind"] for item in found}


def here(home: Home) -> set[str]:
    """The snapshots and apps of a home."""
    images = {info.digest for info in home.images.list()}
    return images | {snapshot.digest for snapshot in home.snapshots.list()}


def make_newer(home: Home, name: str, snapshot: LocalSnapshot) -> str:
    """Put a snapshot there as a torpor of the future may write it; its digest."""
    encoded = (snapshot.directory / "manifest.json").read_bytes()
    newer = msgspec.json.encode({**msgspec.json.decode(encoded), "format": 99, "planets": 9})
    digest = manifest_digest(newer)
    directory = shutil.copytree(home.path / "snapshots" / snapshot.digest, home.path / "newer")
    (directory / "manifest.json").chmod(0o600)
    (directory / "manifest.json").write_bytes(newer)
    directory.rename(home.path / "snapshots" / digest)
    home.journal.set_ref(name, digest)
    return digest


def test_unreadable_snapshots_are_listed(a: Furnished) -> None:
    """`snapshot ls` lists what a newer torpor left, or what is damaged, and says why; so does `ls`.

    Nothing is collected beside a newer one: what that needs is not known.
    """
    newer = make_newer(a.home, "future", a.g)
    broken = a.home.path / "snapshots" / a.saved.digest / "vmstate"
    broken.chmod(0o600)
    broken.write_bytes(b"?")
    listed = {row["snapshot"]: row for row in a.home.run("snapshot", "ls", "--json").json()}
    assert {row["kind"] for row in listed.values()} == {"base", "function", "unreadable"}
    assert listed[newer]["kind"] == listed[a.saved.digest]["kind"] == "unreadable"
    assert listed[newer]["names"] == ["future"]
    assert "has format 99: this torpor reads formats up to" in listed[newer]["reason"]
    assert "vmstate" in listed[a.saved.digest]["reason"]
    table = a.home.run("snapshot", "ls")
    assert table.code == 0
    assert newer[:12] in table.out
    assert "has format 99" in table.err
    assert a.home.run("ls").code == 0
    before = sorted(path.name for path in (a.home.path / "snapshots").iterdir())
    a.home.journal.drop_ref("g")
    assert a.home.run("snapshot", "gc").code == 32
    assert sorted(path.name for path in (a.home.path / "snapshots").iterdir()) == before
    assert a.home.run("snapshot", "rm", "future").code == 0  # now it is collected, as ever
    assert not (a.home.path / "snapshots" / a.g.digest).exists()


def test_nothing_to_do(a: Furnished) -> None:
    """Named snapshots, their base, images and apps all stay."""
    before = here(a.home)
    assert deleted(a.home, "--bases") == {}
    assert here(a.home) == before
    assert a.home.run("snapshot", "gc").err == "nothing to delete\n"


def test_snapshot_without_a_name_goes_with_its_app(a: Furnished) -> None:
    """A dry run says exactly what the run then does."""
    a.home.journal.drop_ref("g")
    before = here(a.home)
    expected = {a.g.digest: "function", a.apps["g"]: "app"}
    assert deleted(a.home, "--dry-run") == expected
    assert here(a.home) == before
    assert deleted(a.home) == expected
    assert here(a.home) == before - set(expected)


def test_parent_of_what_is_kept_may_go(a: Furnished) -> None:
    """A snapshot on a node is complete: it needs no parent, but its app."""
    a.home.journal.drop_ref("f")
    assert deleted(a.home) == {a.f.digest: "function"}
    assert a.home.run("snapshot", "verify", "saved").code == 0


def test_bases(a: Furnished) -> None:
    """With --bases a base goes when nothing descends from it, and is forgotten with its file."""
    for name in ("f", "g"):
        a.home.journal.drop_ref(name)
    assert a.base.digest not in deleted(a.home, "--bases", "--dry-run")
    a.home.journal.drop_ref("saved")
    assert a.base.digest not in deleted(a.home, "--dry-run")
    assert deleted(a.home, "--bases")[a.base.digest] == "base"
    assert a.home.journal.bases() == {}
    assert here(a.home) == {a.image}


def test_base_of_a_broken_line_stays(a: Furnished) -> None:
    """Where the snapshots between are gone, a base of the same image may be the one: it stays."""
    for name in ("f", "g"):
        a.home.journal.drop_ref(name)
    deleted(a.home)
    assert deleted(a.home, "--bases") == {}
    assert a.base.digest in here(a.home)


def test_instance_keeps_its_snapshot(a: Furnished) -> None:
    """What a running instance was made from stays without a name."""
    a.home.journal.drop_ref("g")
    a.home.journal.add_instance("g-1", function="g", snapshot=a.g.digest, port=80)
    assert deleted(a.home, "--bases") == {}
    assert a.g.digest in here(a.home)
    a.home.journal.drop_instance("g-1")


def test_pulled_app_goes_too(a: Furnished, b: Home) -> None:
    """An app that came with a pull is collected like one that was built here."""
    a.home.run("snapshot", "push", "g")
    b.run("snapshot", "pull", "g")
    b.journal.drop_ref("g")
    assert deleted(b) == {a.g.digest: "function", a.apps["g"]: "app"}
