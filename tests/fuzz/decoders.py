"""A fuzz target for each decoder of the repository's format; a program that test_fuzz.py starts.

    python tests/fuzz/decoders.py DECODER [libFuzzer's options and corpus directories]
    python tests/fuzz/decoders.py --seeds      (write tests/data/corpus/ anew)

Only torpor's own errors may come out of a decoder, and no input may make it take memory that the
input's length does not justify. Records are wrapped so that the bytes under test come behind the
checksum, not in front of it: otherwise nothing would get past that.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import atheris
import msgspec
import zstandard

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["torpor.snapshot", "torpor.units"]):
    from torpor.config import Settings
    from torpor.errors import InvalidInput, TorporError
    from torpor.snapshot.manifest import decode_manifest, manifest_digest
    from torpor.snapshot.repository import records
    from torpor.snapshot.repository.chunks import decode, encode
    from torpor.snapshot.repository.domain import PlainDomain
    from torpor.snapshot.repository.fetching import open_window
    from torpor.snapshot.repository.filemap import EncodedMap, decode_map
    from torpor.snapshot.repository.keys import parse_keyring, plain_keyring
    from torpor.snapshot.repository.known import locate
    from torpor.snapshot.repository.records import Kind, Link, WakeLink, hash_bytes
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.working_set import open_segment
    from torpor.store.plain import open_plain
    from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS: Final = Path(__file__).parents[1] / "data" / "corpus"
ALLOWANCE_BYTES: Final = 8 * 1024 * 1024
PER_BYTE: Final = 64 * 40
"""A body may be 64 times its frame; Python's objects some 40 times the MessagePack they are of."""

_RECORDS: Final[dict[Kind, Any]] = {
    Kind.REF: records.RefRecord,
    Kind.MANIFEST: records.SnapshotRecord,
    Kind.WAKE: records.WakeRecord,
    Kind.IMAGE: records.ImageRecord,
    Kind.INDEX: records.IndexRecord,
    Kind.LEASE: records.LeaseRecord,
    Kind.CONDEMNED: records.CondemnedRecord,
}
_PLAIN: Final = PlainDomain()
_KEYRING: Final = plain_keyring()
_REPOSITORY: Final = Repository(open_plain(Settings(), "memory://"), _KEYRING)
_ID: Final = "0" * 32
_MANIFEST_KEY: Final = f"snapshots/{_ID}/{_ID}/manifest"
_WAKE_KEY: Final = f"snapshots/{_ID}/{_ID}/wake"


def wrap(kind: Kind, name: str, body: bytes) -> bytes:
    """A plain record with any body, sound as far as its checksum goes."""
    header = b"TORPOR" + bytes((kind, 1)) + _PLAIN.key_id
    return header + _PLAIN.seal_record(header, name, body)


def fuzz_record(data: bytes) -> None:
    """Unsealing: the first byte says which kind, the second whether the rest is its body or all."""
    kind = Kind(data[0] % len(Kind) + 1) if data else Kind.REF
    whole = data[2:] if data[1:2] == b"\x00" else wrap(kind, "name", data[2:])
    records.unseal(_KEYRING, "name", whole, _RECORDS[kind])


def fuzz_chunk(data: bytes) -> None:
    """Decoding and opening a window."""
    assert len(decode(data)) <= 16 * 1024
    open_window(_PLAIN, bytes(32), data)


def fuzz_filemap(data: bytes) -> None:
    """A map in MessagePack: what is accepted is complete and within its bounds."""
    try:
        encoded = msgspec.msgpack.decode(data, type=EncodedMap)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(str(error)) from None
    file = decode_map(encoded)
    last = -1
    for entry in file:
        assert last < entry.window < 1 << 30
        assert entry.location.offset + entry.location.length <= 64 << 20
        assert file.get(entry.window) == entry
        last = entry.window


def fuzz_index(data: bytes) -> None:
    """An index in MessagePack behind four bytes that say how long its pack is."""
    try:
        record = msgspec.msgpack.decode(data[4:], type=records.IndexRecord)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(str(error)) from None
    size = int.from_bytes(data[:4], "little")
    for _, place in locate(record, size):
        assert 16 <= place.offset < place.offset + place.length <= size


def fuzz_wake(data: bytes) -> None:
    """A wake object's header, the body behind the checksum."""
    header = wrap(Kind.WAKE, _WAKE_KEY, data)
    link = WakeLink(
        key=_WAKE_KEY,
        size_bytes=len(header) + 100_000,
        header_bytes=len(header),
        hash=hash_bytes(header),
    )
    for file in _REPOSITORY.decode_wake(link, header).files.values():
        assert all(entry.location.offset < 100_000 for entry in file)


def fuzz_segment(data: bytes) -> None:
    """A segment: how many windows, their numbers, and the body behind the checksum."""
    count = data[0] if data else 0
    windows, body = data[1 : 1 + 4 * count], data[1 + 4 * count :]
    sealed = _PLAIN.seal_record(b"TORPOR-SEGMENT-1", _WAKE_KEY, body)
    record = records.SegmentRecord(
        file="memory", windows=windows, offset=0, length=len(sealed), hash=hash_bytes(sealed)
    )
    open_segment(_PLAIN, _WAKE_KEY, record, sealed, size_bytes=1 << 20)


def fuzz_ref(data: bytes) -> None:
    """A ref, the body behind the checksum."""
    _REPOSITORY.store.put("refs/f", wrap(Kind.REF, "refs/f", data))
    _REPOSITORY.read_ref("f")


def fuzz_snapshot(data: bytes) -> None:
    """A manifest's record, the body behind the checksum; the digest is that of what it holds."""
    try:
        body = records.unseal(
            _KEYRING, "name", wrap(Kind.MANIFEST, "name", data), records.SnapshotRecord
        )[0]
        digest = manifest_digest(body.manifest)
    except TorporError:
        digest = Digest("0" * 64)
    whole = wrap(Kind.MANIFEST, _MANIFEST_KEY, data)
    _REPOSITORY.store.put(_MANIFEST_KEY, whole)
    link = Link(key=_MANIFEST_KEY, size_bytes=len(whole), hash=hash_bytes(whole))
    _REPOSITORY.read_snapshot(digest, link)


def fuzz_keyring(data: bytes) -> None:
    """A keyring's text, whatever bytes were in the variable or file."""
    ring = parse_keyring(data.decode("utf-8", "surrogateescape"), source="somewhere")
    assert not ring.current.is_plain


def fuzz_manifest(data: bytes) -> None:
    """A node's manifest under its own digest."""
    manifest = decode_manifest(data, manifest_digest(data))
    assert sum(length for _, length in manifest.memory.extents) <= manifest.memory.size_bytes


DECODERS: Final[dict[str, Callable[[bytes], None]]] = {
    "record": fuzz_record,
    "chunk": fuzz_chunk,
    "filemap": fuzz_filemap,
    "index": fuzz_index,
    "wake": fuzz_wake,
    "segment": fuzz_segment,
    "ref": fuzz_ref,
    "snapshot": fuzz_snapshot,
    "keyring": fuzz_keyring,
    "manifest": fuzz_manifest,
}


@atheris.instrument_func
def fuzz_broken(data: bytes) -> None:
    """A decoder with a bug behind a comparison, to show that one is found."""
    if data[:2] == b"ab":
        raise ValueError("a bug")


def fuzz_hungry(data: bytes) -> None:
    """A decoder that believes a length, to show that one is found."""
    if data[:1] == b"a":
        bytearray(b"x") * (64 << 20)


BROKEN: Final = {"broken": fuzz_broken, "hungry": fuzz_hungry}
"""What must fail: the proof that the others could."""


def check(decoder: Callable[[bytes], None], data: bytes) -> None:
    """Run a decoder on an input. Raises what is no error of torpor's, or for its memory."""
    before = _peak_bytes()
    with contextlib.suppress(TorporError):
        decoder(data)
    grown = _peak_bytes() - before
    if grown > ALLOWANCE_BYTES + PER_BYTE * len(data):
        raise MemoryError(f"{len(data)} bytes of input took {grown} bytes of memory")


def seeds() -> dict[str, list[bytes]]:
    """Sound inputs of each decoder, taken from the golden repositories."""
    from fixtures.golden import DATA, KEY

    root = DATA / "plain"
    found: dict[str, list[bytes]] = {name: [] for name in DECODERS}

    def body(path: Path, kind: Kind) -> tuple[bytes, Any]:
        name = str(path.relative_to(root))
        record, _ = records.unseal(_KEYRING, name, path.read_bytes(), _RECORDS[kind])
        encoded = msgspec.msgpack.encode(record)
        found["record"].append(bytes((kind - 1, 1, 0)) + encoded)
        found["record"].append(bytes((kind - 1, 1)) + records._pack(encoded))
        return b"\x00" + encoded, record

    for path in sorted((root / "refs").iterdir()):
        found["ref"].append(body(path, Kind.REF)[0].replace(path.name.encode(), b"f"))
    ref = records.unseal(
        _KEYRING, "refs/hello", (root / "refs" / "hello").read_bytes(), records.RefRecord
    )[0]
    found["ref"] = [b"\x00" + msgspec.msgpack.encode(msgspec.structs.replace(ref, name="f"))]
    for path in sorted(root.glob("snapshots/*/*/manifest")):
        encoded, record = body(path, Kind.MANIFEST)
        found["snapshot"].append(encoded)
        found["manifest"].append(record.manifest)
        found["filemap"] += [msgspec.msgpack.encode(record.memory)]
        name = record.wake.key
        header = (root / name).read_bytes()[: record.wake.header_bytes]
        wake, _ = records.unseal(_KEYRING, name, header, records.WakeRecord)
        found["wake"].append(b"\x00" + msgspec.msgpack.encode(wake))
        found["filemap"].append(msgspec.msgpack.encode(wake.files["vmstate"]))
    for path in sorted((root / "images").glob("*/*")):
        _, record = body(path, Kind.IMAGE)
        found["filemap"].append(msgspec.msgpack.encode(record.content))
    for path in sorted((root / "index").iterdir()):
        encoded, _ = body(path, Kind.INDEX)
        size = (root / "packs" / path.name).stat().st_size
        found["index"].append(size.to_bytes(4, "little") + encoded[1:])
        found["chunk"] += [_chunk(root, path.name, encoded)]
    found["chunk"].append(b"\x00as it is")
    two_windows = b"\x02" + b"\x03\0\0\0" + b"\x00\0\0\0"
    found["segment"] = [two_windows + encode(bytes(2 << 14), level=3), b"\x00", two_windows]
    found["keyring"] = [f"{KEY}\n".encode(), f"# two\n\n{KEY}\n {KEY[:-1]}f\n".encode()]
    return found


def _chunk(root: Path, pack: str, encoded: bytes) -> bytes:
    record = msgspec.msgpack.decode(encoded[1:], type=records.IndexRecord)
    place = [*locate(record, (root / "packs" / pack).stat().st_size)][-1][1]
    return (root / "packs" / pack).read_bytes()[place.offset : place.offset + place.length]


def write_seeds() -> None:
    """Write the corpus anew; inputs that once did harm are made below, by hand."""
    for name, inputs in seeds().items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(sorted(set(inputs), key=len)[:6]):
            (CORPUS / name / f"seed-{number}").write_bytes(data)
    for name, data in _harmful().items():
        (CORPUS / name).write_bytes(data)


def _harmful() -> dict[str, bytes]:
    """Inputs on which a plausible decoder fails: bombs, depth, bad text, lengths that lie."""
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    manifest = bytes((Kind.MANIFEST - 1, 1))
    return {
        "record/bomb": manifest + b"\x01" + bomb,
        "record/claim": manifest + b"\x01\x28\xb5\x2f\xfd\xa0\xff\xff\xff\x0f" + bytes(9),
        "record/depth": manifest + b"\x00\x81\xa1z" + b"\x91" * 3000,
        "record/text": bytes((Kind.LEASE - 1, 1)) + b"\x00\x81\xa7purpose\xa2\xff\xff",
        "record/many": bytes((Kind.CONDEMNED - 1, 1)) + b"\x00\x81\xa4keys\xdd\xff\xff\xff\xff",
        "wake/bomb": b"\x01" + bomb,
        "snapshot/bomb": b"\x01" + bomb,
        "chunk/bomb": b"\x01" + bomb,
        "segment/bomb": b"\x01\0\0\0\0\x01" + bomb,
        "filemap/many": b"\x93\xcf\x00\x00\x10\x00\x00\x00\x00\x00\xdd\xff\xff\xff\xff",
        "filemap/far": b"\x93\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x90\x90",
        "manifest/depth": b'{"x":' + b"[" * 3000,
        "manifest/text": b'{"format":1,"kind":"\xff"}',
        "manifest/number": b'{"format":' + b"9" * 3000 + b"}",
        "keyring/bytes": b"\xff\xfe\n\x85torpor-key-1:\xc2\xb2",
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Fuzz one decoder with libFuzzer, after all of its corpus."""
    name = sys.argv.pop(1)
    if name == "--seeds":
        write_seeds()
        return
    decoder = {**DECODERS, **BROKEN}[name]
    for path in sorted((CORPUS / name).glob("*")):
        check(decoder, path.read_bytes())
    gc.collect()
    atheris.Setup(sys.argv, lambda data: check(decoder, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
