"""docs/format.md, the golden repositories, the reader, and a second reader agree."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from fixtures import second_reader
from fixtures.exchange import Quiet, TestNode, assert_same
from fixtures.golden import DATA, KEYRINGS, REFS, Golden, describe, open_golden
from torpor.config import Settings
from torpor.errors import Damaged, Incompatible
from torpor.snapshot.manifest import decode_manifest, encode_manifest, manifest_digest
from torpor.snapshot.repository import wake
from torpor.snapshot.repository.filemap import Location, encode_map
from torpor.snapshot.repository.pulling import pull
from torpor.snapshot.repository.records import (
    ImageRecord,
    Link,
    RefRecord,
    SnapshotRecord,
    WakeRecord,
    hash_bytes,
    seal,
    unseal,
)
from torpor.snapshot.repository.repository import Repository
from torpor.snapshot.repository.working_set import open_segment, seal_segments
from torpor.snapshot.windows import WINDOW_BYTES, Touched
from torpor.store.plain import open_plain
from torpor.units import Digest

if TYPE_CHECKING:
    from torpor.snapshot.local import LocalSnapshot

DOMAINS = ("sealed", "plain")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """The node from which the golden repositories were pushed."""
    return Golden.make(tmp_path_factory.mktemp("golden"))


@pytest.fixture(params=DOMAINS)
def domain(request: pytest.FixtureRequest) -> str:
    """Which of the golden repositories."""
    return str(request.param)


def expected(domain: str) -> dict[str, dict[str, object]]:
    """What a golden repository must be read as."""
    read: dict[str, dict[str, object]] = json.loads((DATA / "expected.json").read_text())[domain]
    return read


def domains_of(name: str) -> list[second_reader.Plain]:
    """The second reader's keys for a golden repository."""
    if name == "plain":
        return [second_reader.Plain()]
    return second_reader.read_keyring((DATA / "keyring").read_text())


def pull_all(repository: Repository, node: TestNode, ref: str) -> LocalSnapshot:
    """A snapshot on a node that had nothing of it."""
    digest, _, _ = pull(repository, ref, here=node.here(), progress=Quiet())
    return node.snapshots.get(digest)


def assert_restored(
    found: second_reader.Restored, snapshot: LocalSnapshot, images: dict[Digest, Path]
) -> None:
    """The second reader's snapshot has the same bytes in every file."""
    assert found.digest == snapshot.digest
    assert found.memory == snapshot.memory.read_bytes()
    assert found.disk == snapshot.disk.read_bytes()
    assert found.vmstate == snapshot.vmstate.read_bytes()
    assert found.images == {
        digest: path.read_bytes() for digest, path in images.items() if digest in found.images
    }
    assert snapshot.manifest.image in found.images


def test_golden_repositories_are_small() -> None:
    """They stay a small part of the source tree."""
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000


@pytest.mark.parametrize("ref", REFS)
def test_todays_reader_reads_format_1(
    domain: str, ref: str, golden: Golden, tmp_path: Path
) -> None:
    """What the first writer of format 1 pushed arrives bit by bit."""
    node = TestNode(tmp_path / "b")
    repository = open_golden(domain, tmp_path / "store")
    assert_same(pull_all(repository, node, ref), golden.by_ref[ref])
    for digest, path in golden.images.items():
        assert node.images[digest].read_bytes() == path.read_bytes()
    assert describe(repository) == expected(domain)


def test_todays_writer_writes_the_same_structure(
    domain: str, golden: Golden, tmp_path: Path
) -> None:
    """The same input gives the same object names but for their random part, and the same maps."""
    store = open_plain(Settings(), f"file://{tmp_path}/store")
    repository = Repository(store, KEYRINGS[domain])
    for ref in REFS:
        golden.push(repository, ref)
    assert describe(repository) == expected(domain)


def test_todays_writer_builds_on_format_1(domain: str, golden: Golden, tmp_path: Path) -> None:
    """What the first writer sent is not sent again."""
    repository = open_golden(domain, tmp_path / "store")
    before = {info.key for info in repository.store.list("packs/")}
    repository.store.delete("refs/hello")
    repository.store.delete("refs/hello.sleeping")
    golden.push(repository, "hello.sleeping")
    assert {info.key for info in repository.store.list("packs/")} == before


@pytest.mark.parametrize("ref", REFS)
def test_second_reader_reads_format_1(domain: str, ref: str, golden: Golden) -> None:
    """A reader written from the page alone restores the golden repositories, by ref and digest."""
    reader = second_reader.Reader(DATA / domain, domains_of(domain))
    snapshot = golden.by_ref[ref]
    assert reader.refs() == sorted(REFS)
    found = reader.restore(ref, expect_digest=snapshot.digest)
    assert_restored(found, snapshot, golden.images)
    assert_restored(reader.restore_by_digest(snapshot.digest), snapshot, golden.images)
    chunks = {
        name: {str(window): chunk.chunk_id.hex() for window, chunk in file.windows.items()}
        for name, file in found.maps.items()
    }
    assert chunks == expected(domain)[ref]["chunks"]


def test_second_reader_reads_the_indexes(domain: str) -> None:
    """Every chunk that a map names lies where its pack's index says."""
    reader = second_reader.Reader(DATA / domain, domains_of(domain))
    found = reader.restore("hello.sleeping")
    packed = [
        chunk
        for file in found.maps.values()
        for chunk in file.windows.values()
        if chunk.object_name.startswith("packs/")
    ]
    assert packed
    for chunk in packed:
        index = reader.index(chunk.object_name.removeprefix("packs/"))
        assert index[chunk.chunk_id] == (chunk.offset, chunk.length)


def test_second_reader_reads_what_is_pushed_today(
    domain: str, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a snapshot whose disk is too large for its wake object."""
    monkeypatch.setattr(wake, "LARGEST_DISK_BYTES", 0)
    store = open_plain(Settings(), f"file://{tmp_path}/store")
    golden.push(Repository(store, KEYRINGS[domain]), "hello")
    reader = second_reader.Reader(tmp_path / "store", domains_of(domain))
    found = reader.restore("hello")
    assert "wake/disk" not in found.maps
    assert_restored(found, golden.by_ref["hello"], golden.images)


def test_second_reader_reads_segments(domain: str, golden: Golden, tmp_path: Path) -> None:
    """Working sets that today's writer seals are what the page says, and so for today's reader."""
    repository = open_golden(domain, tmp_path / "store")
    own = KEYRINGS[domain].current
    snapshot = golden.by_ref["hello"]
    image = golden.images[snapshot.manifest.image]
    files = {"memory": snapshot.memory.read_bytes(), "image": image.read_bytes()}
    touched = [Touched("memory", (3, 0, 23, 1, 9)), Touched("image", (2, 0))]
    key = f"snapshots/{'0' * 32}/{'1' * 32}/wake"

    def read(file: str, window: int) -> bytes:
        return files[file][window * WINDOW_BYTES : (window + 1) * WINDOW_BYTES]

    sealed = list(seal_segments(own, key, touched, read=read, origin=7, level=3))
    records = tuple(record for record, _ in sealed)
    header = seal(own, key, WakeRecord(files={}, working_set=records))
    whole = header + bytes(7) + b"".join(data for _, data in sealed)
    repository.store.put(key, whole)
    link = {
        "key": key,
        "size_bytes": len(whole),
        "header_bytes": len(header),
        "hash": hash_bytes(header),
    }
    sizes = {file: len(content) for file, content in files.items()}
    reader = second_reader.Reader(tmp_path / "store", domains_of(domain))
    expected_windows = [
        (part.file, n, read(part.file, n)) for part in touched for n in sorted(part.windows)
    ]
    assert list(reader.working_set(link, sizes)) == expected_windows
    for (record, data), part in zip(sealed, touched, strict=True):
        content = open_segment(own, key, record, data, size_bytes=sizes[part.file])
        assert content == b"".join(read(part.file, window) for window in sorted(part.windows))
        with pytest.raises(Damaged, match="behind its file's end"):
            open_segment(own, key, record, data, size_bytes=WINDOW_BYTES)


def test_second_reader_refuses_every_flipped_bit(domain: str, tmp_path: Path) -> None:
    """A byte changed anywhere that a restore reads is noticed by the second reader too."""
    shutil.copytree(DATA / domain, tmp_path / "store")
    reader = second_reader.Reader(tmp_path / "store", domains_of(domain))
    whole = reader.restore("hello")
    used = {chunk.object_name for file in whole.maps.values() for chunk in file.windows.values()}
    for path in [p for p in (tmp_path / "store").rglob("*") if p.is_file()]:
        name = str(path.relative_to(tmp_path / "store"))
        if name.startswith("index/") or (name.startswith("packs/") and name not in used):
            continue
        data = path.read_bytes()
        noticed = 0
        for place in range(20, len(data), max(1, len(data) // 5)):
            path.write_bytes(data[:place] + bytes((data[place] ^ 4,)) + data[place + 1 :])
            try:
                again = [reader.restore(ref) for ref in REFS]
            except second_reader.BadRepositoryError:
                noticed += 1
                continue
            assert again[0].memory == whole.memory
        path.write_bytes(data)
        assert noticed or _is_of_no_ref(name, reader), name


def _is_of_no_ref(name: str, reader: second_reader.Reader) -> bool:
    records = [
        reader.open_record(f"refs/{ref}", (reader.root / "refs" / ref).read_bytes(), 1)[0]
        for ref in REFS
    ]
    used = {
        link for record in records for link in (record["manifest"]["key"], record["wake"]["key"])
    }
    return name.startswith("snapshots/") and name not in used


def test_second_reader_shares_no_code() -> None:
    """It imports nothing of torpor's."""
    tree = ast.parse(Path(second_reader.__file__).read_text())
    names = [
        *(n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)),
        *(a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names),
    ]
    own = set(sys.stdlib_module_names) | {"blake3", "cryptography", "msgspec", "zstandard"}
    assert {name.partition(".")[0] for name in names} <= own


# newer versions


@pytest.mark.parametrize(
    "pattern",
    ["refs/hello", "snapshots/*/*/manifest", "snapshots/*/*/wake", "images/*/*"],
)
def test_newer_record(domain: str, pattern: str, golden: Golden, tmp_path: Path) -> None:
    """A record of version 2 is refused by object and version, wherever in the chain it stands."""
    repository = open_golden(domain, tmp_path / "store")
    newer = _with_newer(repository, tmp_path / "store", pattern)
    node = TestNode(tmp_path / "b")
    with pytest.raises(Incompatible, match=f"{newer} has format version 2.*up to 1"):
        pull_all(repository, node, "hello")
    assert node.left_over() == []


def _with_newer(repository: Repository, root: Path, pattern: str) -> str:
    """Make one record below the ref hello a newer one, and the links to it fit again."""
    ref_data, _ = repository.store.get("refs/hello", limit_bytes=1 << 20)
    ref, domain = unseal(repository.keyring, "refs/hello", ref_data, RefRecord)
    key = ref.manifest.key
    data, _ = repository.store.get(key, limit_bytes=1 << 20)
    record, _ = unseal(repository.keyring, key, data, SnapshotRecord)
    if pattern == "refs/hello":
        (root / pattern).write_bytes(_newer(ref_data))
        return pattern
    if pattern.startswith("images/"):
        image = record.images[0]
        changed = _newer((root / image.record.key).read_bytes())
        (root / image.record.key).write_bytes(changed)
        link = msgspec.structs.replace(image.record, hash=hash_bytes(changed))
        images = (msgspec.structs.replace(image, record=link), *record.images[1:])
        record = msgspec.structs.replace(record, images=images)
        name, data = image.record.key, seal(domain, key, record)
    elif pattern.endswith("/wake"):
        whole = (root / record.wake.key).read_bytes()
        changed = _newer(whole)
        (root / record.wake.key).write_bytes(changed)
        header = hash_bytes(changed[: record.wake.header_bytes])
        wake = msgspec.structs.replace(record.wake, hash=header)
        record = msgspec.structs.replace(record, wake=wake)
        name, data = record.wake.key, seal(domain, key, record)
    else:
        name, data = key, _newer(data)
    repository.store.put(key, data)
    link = Link(key=key, size_bytes=len(data), hash=hash_bytes(data))
    ref = msgspec.structs.replace(ref, manifest=link, wake=record.wake)
    repository.store.put("refs/hello", seal(domain, "refs/hello", ref))
    return name


def _newer(data: bytes) -> bytes:
    return data[:7] + b"\x02" + data[8:]


def test_newer_chunk(domain: str, tmp_path: Path) -> None:
    """A chunk with an encoding of the future is refused by object and encoding."""
    repository = open_golden(domain, tmp_path / "store")
    ref = repository.read_ref("hello")
    assert ref is not None
    record = unseal(
        repository.keyring,
        ref.record.manifest.key,
        repository.store.get(ref.record.manifest.key, limit_bytes=1 << 20)[0],
        SnapshotRecord,
    )[0]
    key = record.wake.key
    wake = repository.read_wake(record.wake)
    entry = next(iter(wake.files["vmstate"]))
    sealed = ref.domain.seal_chunk(entry.chunk_id, b"\x02from the future")
    place = Location(entry.location.pack, 0, len(sealed))
    size = wake.files["vmstate"].size_bytes
    files = {"vmstate": encode_map(size, [entry._replace(location=place)])}
    header = seal(ref.domain, key, WakeRecord(files=files, working_set=()))
    repository.store.put(key, header + sealed)
    link = msgspec.structs.replace(
        record.wake,
        size_bytes=len(header) + len(sealed),
        header_bytes=len(header),
        hash=hash_bytes(header),
    )
    manifest_key = ref.record.manifest.key
    data = seal(ref.domain, manifest_key, msgspec.structs.replace(record, wake=link))
    repository.store.put(manifest_key, data)
    repository.write_ref(
        "hello",
        snapshot=ref.record.snapshot,
        manifest=Link(key=manifest_key, size_bytes=len(data), hash=hash_bytes(data)),
        wake=link,
        before=ref,
    )
    node = TestNode(tmp_path / "b")
    with pytest.raises(Incompatible, match=f"{key}.*encoding 2.*up to 1"):
        pull_all(repository, node, "hello")
    assert node.left_over() == []


def test_newer_manifest() -> None:
    """A node's manifest of format 2 is refused by snapshot and format, format 0 as damaged."""
    text = json.loads(str(expected("plain")["hello"]["manifest"]))
    for version, error in ((2, Incompatible), (0, Damaged)):
        encoded = json.dumps({**text, "format": version}, sort_keys=True).encode()
        with pytest.raises(error, match=f"format {version}"):
            decode_manifest(encoded, manifest_digest(encoded))


def test_newer_index_is_passed_by(domain: str, golden: Golden, tmp_path: Path) -> None:
    """A push does not build on an index of the future, and does not fail of it."""
    repository = open_golden(domain, tmp_path / "store")
    for path in (tmp_path / "store" / "index").iterdir():
        path.write_bytes(_newer(path.read_bytes()))
    for path in (tmp_path / "store" / "snapshots").iterdir():
        shutil.rmtree(path)
    for ref in REFS:
        repository.store.delete(f"refs/{ref}")
    golden.push(repository, "hello")
    assert_same(pull_all(repository, TestNode(tmp_path / "b"), "hello"), golden.by_ref["hello"])


# what a manifest may not say


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parent": "../../etc"}, "not a digest"),
        ({"image": "x"}, "not a digest"),
        ({"vmstate": {"size_bytes": 1 << 40, "digest": "0" * 64}}, "a vmstate of"),
        ({"function": None}, "do not fit"),
        (
            {"function": {"name": "../f", "revision": 1, "port": 1, "app": "0" * 64}},
            "function name",
        ),
        ({"memory": {"size_bytes": -1, "extents": [], "digest": "0" * 64}}, "memory has"),
    ],
)
def test_manifest_that_makes_no_sense(change: dict[str, object], reason: str) -> None:
    """A manifest that could not be, whoever signed it, is refused before anything is done."""
    text = json.loads(str(expected("plain")["hello"]["manifest"]))
    encoded = json.dumps({**text, **change}, sort_keys=True).encode()
    with pytest.raises(Damaged, match=reason):
        decode_manifest(encoded, manifest_digest(encoded))


def test_manifest_bytes_are_canonical() -> None:
    """Decoding and encoding a manifest gives the same bytes, so its digest is one."""
    text = str(expected("plain")["hello"]["manifest"]).encode()
    assert encode_manifest(decode_manifest(text, manifest_digest(text))) == text


def test_image_record_of_another_image(domain: str, tmp_path: Path) -> None:
    """A sound record with another digest than its link says is refused."""
    repository = open_golden(domain, tmp_path / "store")
    ref = repository.read_ref("hello")
    assert ref is not None
    stored = repository.read_snapshot(ref.record.snapshot, ref.record.manifest)
    image = stored.images[0]
    data, _ = repository.store.get(image.record.key, limit_bytes=1 << 20)
    record, _ = unseal(repository.keyring, image.record.key, data, ImageRecord)
    other = msgspec.structs.replace(record, digest=Digest("0" * 64))
    data = seal(ref.domain, image.record.key, other)
    repository.store.put(image.record.key, data)
    link = Link(key=image.record.key, size_bytes=len(data), hash=hash_bytes(data))
    with pytest.raises(Damaged, match="another image"):
        repository.read_image(msgspec.structs.replace(image, record=link))
