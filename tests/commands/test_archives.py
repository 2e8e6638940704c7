"""`torpor snapshot export` and `import`: a snapshot in one file."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.exchange import assert_same
from fixtures.homes import Furnished, Home

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow


@pytest.fixture
def archive(a: Furnished, tmp_path: Path) -> Path:
    """`saved` of home A in a file."""
    path = tmp_path / "saved.tar"
    answer = a.home.run("snapshot", "export", "saved", path)
    assert answer.code == 0, answer.err
    return path


def test_without_a_store(a: Furnished, b: Home, archive: Path) -> None:
    """A snapshot comes over whole in one file, images too, where there is no store."""
    alone = Home(b.path, "")
    imported = alone.run("snapshot", "import", archive, "--json").json()
    assert imported["snapshot"] == a.saved.digest
    assert imported["name"] == "saved"
    assert_same(alone.snapshots.get(a.saved.digest), a.saved)
    assert alone.run("snapshot", "verify", "saved").code == 0
    assert {info.digest for info in alone.images.list()} == {a.image, a.apps["f"]}


def test_it_is_a_tar_file(archive: Path) -> None:
    """Any tar lists it; its objects are named as in a store; only its owner may read it."""
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert names[0] == "torpor-archive"
    assert names[-1] == "refs/saved"
    kinds = {name.split("/")[0] for name in names}
    assert kinds == {"torpor-archive", "packs", "index", "snapshots", "images", "refs"}
    assert archive.stat().st_mode & 0o777 == 0o600
    assert archive.stat().st_size % 10240 == 0


def test_says_which_key_opens_it(a: Furnished, tmp_path: Path) -> None:
    """The key that the other side needs is named, and never printed."""
    key = a.home.run("key", "show", "--reveal", "--json").json()["keys"][0]
    answer = a.home.run("snapshot", "export", "f", tmp_path / "f.tar")
    assert f"needs key {key['id']}" in answer.err
    assert key["key"] not in answer.out + answer.err
    assert key["key"].encode() not in (tmp_path / "f.tar").read_bytes()


def test_no_key_asks_for_a_decision(a: Furnished, tmp_path: Path) -> None:
    """Without a key there is no archive until --plain was said; then anybody imports it."""
    (a.home.path / "key").unlink()
    path = tmp_path / "f.tar"
    answer = Home(a.home.path, "").run("snapshot", "export", "f", path)
    assert answer.code == 2
    assert "--plain" in answer.err
    assert not path.exists()
    answer = a.home.run("snapshot", "export", "f", path, "--plain")
    assert answer.code == 0
    assert "PLAIN" in answer.err
    keyless = Home(tmp_path / "d", "")
    assert keyless.run("snapshot", "import", path).code == 0
    assert_same(keyless.snapshots.get(a.f.digest), a.f)


def test_plain_is_taken_by_decision_alone(a: Furnished, b: Home, tmp_path: Path) -> None:
    """Who has a key does not take an archive that is not sealed unless told so."""
    path = tmp_path / "f.tar"
    a.home.run("snapshot", "export", "f", path, "--plain")
    answer = b.run("snapshot", "import", path)
    assert answer.code == 33
    assert b.files() == []
    assert b.run("snapshot", "import", path, "--plain").code == 0


def test_another_key(stranger: Home, archive: Path) -> None:
    """Without the key it stays closed, with no key and with another."""
    for _ in range(2):
        answer = stranger.run("snapshot", "import", archive)
        assert answer.code == 33
        assert "sealed with key" in answer.err
        assert stranger.files() == []
        stranger.run("key", "init")


def test_another_name(a: Furnished, b: Home, tmp_path: Path) -> None:
    """The name can be chosen on both sides."""
    path = tmp_path / "f.tar"
    assert a.home.run("snapshot", "export", "f", path, "--name", "there").code == 0
    assert b.run("snapshot", "import", path, "--name", "here").code == 0
    assert b.run("snapshot", "inspect", "here", "--json").json()["names"] == ["here"]
    assert b.run("snapshot", "import", path, "--name", "../x").code == 2


def test_expected_digest(a: Furnished, b: Home, archive: Path) -> None:
    """An archive of another snapshot than the expected one is refused."""
    answer = b.run("snapshot", "import", archive, "--expect-digest", a.f.digest)
    assert answer.code == 4
    assert b.files() == []
    assert b.run("snapshot", "import", archive, "--expect-digest", a.saved.digest).code == 0


def test_through_pipes(a: Furnished, b: Home) -> None:
    """- is standard output and input; all that is said goes to standard error."""
    exported = a.home.run_program("snapshot", "export", "saved", "-")
    assert exported.returncode == 0, exported.stderr
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as tar:
        assert tar.getnames()[-1] == "refs/saved"
    imported = b.run_program("snapshot", "import", "-", stdin=exported.stdout)
    assert imported.returncode == 0, imported.stderr
    assert_same(b.snapshots.get(a.saved.digest), a.saved)
    assert [name for name in b.files() if "archive" in name] == []


def test_reader_that_went_away(a: Furnished) -> None:
    """A pipe that nobody reads is an error, not success."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        a.home.command("snapshot", "export", "saved", "-"),
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert process.returncode == 10
    assert b"standard output" in process.stderr


def test_full_disk(a: Furnished, tmp_path: Path) -> None:
    """A disk that is full is called that; of a file that cannot grow nothing is left."""
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            a.home.command("snapshot", "export", "saved", "-"),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert process.returncode == 12, process.stderr
    limited = ["prlimit", "--fsize=100000", *a.home.command("snapshot", "export", "saved")]
    target = tmp_path / "out" / "x.tar"
    target.parent.mkdir()
    process = subprocess.run([*limited, str(target)], capture_output=True, timeout=60, check=False)
    assert process.returncode == 10, process.stderr
    assert f"cannot write {target}".encode() in process.stderr
    assert list(target.parent.iterdir()) == []


def test_replaces_an_older_file_only_when_whole(a: Furnished, archive: Path) -> None:
    """An export that fails leaves the file that was there, and nothing beside it."""
    before = archive.read_bytes()
    app = a.home.images.path(a.apps["f"])
    app.unlink()
    assert a.home.run("snapshot", "export", "saved", archive).code != 0
    assert archive.read_bytes() == before
    assert [path.name for path in archive.parent.iterdir() if "tar" in path.name] == [archive.name]
    assert a.home.run("snapshot", "export", "g", archive).code == 0
    assert archive.read_bytes() != before


def test_place_that_cannot_be_written(a: Furnished, tmp_path: Path) -> None:
    """A directory that is not there, or a directory as the file: said, nothing made."""
    for target in (tmp_path / "none" / "x.tar", tmp_path):
        answer = a.home.run("snapshot", "export", "f", target)
        assert answer.code == 2
        assert str(target) in answer.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "it is too short"),
        (lambda data: data[:300], "it is too short"),
        (lambda data: data[: len(data) // 2], "it ends within"),
        (lambda data: data[: _end_of_ref(data) - 1], "it ends within"),
        (lambda data: data[: -(-_end_of_ref(data) // 512) * 512], "its end is missing"),
        (lambda data: data + b"x" * 512, "something is behind its end"),
        (lambda data: data + bytes(2 << 20), "are behind its last object"),
        (lambda data: b"PK\x03\x04" + data[4:], "it is not an archive that"),
        (lambda data: data[:512] + b"zwei" + data[516:], "its version is not a number"),
        (lambda data: _flip(data, len(data) // 2), "object packs/"),
        (lambda data: _flip(data, 1024 + 20), "there is no header of an object"),
        (lambda data: _flip(data, _end_of_ref(data) - 30), "object refs/saved"),
    ],
    ids=[
        "empty",
        "half a header",
        "half",
        "cut in the last object",
        "no end",
        "extended",
        "extended by zeros",
        "a zip file",
        "version",
        "bit in a pack",
        "bit in a header",
        "bit in the ref",
    ],
)
def test_damaged_archive(
    b: Home, archive: Path, spoil: Callable[[bytes], bytes], words: str
) -> None:
    """Whatever is wrong with the file: it is named, and nothing is left on the node."""
    archive.write_bytes(spoil(archive.read_bytes()))
    answer = b.run("snapshot", "import", archive)
    assert answer.code == 31, answer.err
    assert f"archive {archive} is damaged" in answer.err
    assert words in answer.err
    assert b.files() == []


def test_newer_archive(b: Home, archive: Path) -> None:
    """A newer version is called that."""
    data = archive.read_bytes()
    archive.write_bytes(data[:512] + b"9" + data[513:])
    answer = b.run("snapshot", "import", archive)
    assert answer.code == 32
    assert "archive version 9" in answer.err


def _rebuilt(archive: Path, change: Callable[[tarfile.TarInfo, bytes], None]) -> None:
    """Write the archive again, each member changed."""
    with tarfile.open(archive) as tar:
        members = []
        for member in tar.getmembers():
            stream = tar.extractfile(member)
            members.append((member, stream.read() if stream else b""))
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            change(member, data)
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)


def _link(member: tarfile.TarInfo, _: bytes) -> None:
    if member.name.startswith("packs/"):
        member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/shadow", 0


def _climb(member: tarfile.TarInfo, _: bytes) -> None:
    if member.name.startswith("packs/"):
        member.name = "../../etc/cron.d/x"


def _twice(member: tarfile.TarInfo, _: bytes) -> None:
    if member.name.startswith(("packs/", "index/")):
        member.name = "packs/" + "0" * 32


def _two_refs(member: tarfile.TarInfo, _: bytes) -> None:
    if member.name.startswith("index/"):
        member.name = f"refs/{member.name[6:20]}"


def _absolute(member: tarfile.TarInfo, _: bytes) -> None:
    member.name = f"/{member.name}"


@pytest.mark.parametrize("change", [_link, _climb, _twice, _two_refs, _absolute])
def test_hostile_archive(
    b: Home, archive: Path, tmp_path: Path, change: Callable[[tarfile.TarInfo, bytes], None]
) -> None:
    """Links, names that climb, the same name twice, refs too many: refused, nothing unpacked."""
    _rebuilt(archive, change)
    before = sorted(path.name for path in tmp_path.iterdir())
    answer = b.run("snapshot", "import", archive)
    assert answer.code == 31, answer.err
    assert str(archive) in answer.err
    assert b.files() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_order_of_members_does_not_matter(a: Furnished, b: Home, archive: Path) -> None:
    """What another tar program packed again is read too."""
    _rebuilt(archive, lambda member, _: None)
    assert b.run("snapshot", "import", archive).code == 0
    assert_same(b.snapshots.get(a.saved.digest), a.saved)


def test_length_that_the_file_does_not_have(b: Home, archive: Path) -> None:
    """A header that claims more than the file has is refused before anything is allocated."""
    data = bytearray(archive.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(data[1024:1536]), "ascii", "strict")
    header.size = (8 << 30) - 1
    data[1024:1536] = header.tobuf(tarfile.USTAR_FORMAT)
    archive.write_bytes(data)
    answer = b.run("snapshot", "import", archive)
    assert answer.code == 31
    assert f"it ends within '{header.name}'" in answer.err


def test_not_a_file(b: Home, tmp_path: Path) -> None:
    """A missing file, a directory and a FIFO are said to be that, without hanging."""
    os.mkfifo(tmp_path / "fifo")
    assert b.run("snapshot", "import", tmp_path / "none").code == 3
    assert b.run("snapshot", "import", tmp_path).code == 2
    assert b.run("snapshot", "import", tmp_path / "fifo").code == 2


def _end_of_ref(data: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    assert last.name == "refs/saved"
    return last.offset_data + last.size


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
