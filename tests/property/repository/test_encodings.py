"""Encodings of the repository: whatever goes in comes out, and nothing else is taken."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fixtures.forging import seal_raw
from torpor.errors import Damaged, Incompatible
from torpor.snapshot.repository.chunks import ID_BYTES, LONGEST_BYTES, decode, encode
from torpor.snapshot.repository.domain import Domain, PlainDomain, SealedDomain
from torpor.snapshot.repository.filemap import (
    PACK_ID_BYTES,
    EncodedMap,
    EncodedRun,
    Entry,
    Location,
    decode_map,
    encode_map,
)
from torpor.snapshot.repository.keys import Keyring, plain_keyring
from torpor.snapshot.repository.known import locate
from torpor.snapshot.repository.packing import PACK_HEADER
from torpor.snapshot.repository.records import (
    LIMITS,
    ImageRecord,
    IndexRecord,
    Kind,
    LeaseRecord,
    seal,
    unseal,
)
from torpor.snapshot.windows import WINDOW_BYTES
from torpor.units import Digest

FAST = settings(deadline=None, max_examples=100, derandomize=True)
DOMAINS = st.one_of(st.builds(PlainDomain), st.binary(min_size=32, max_size=32).map(SealedDomain))
WINDOWS = st.one_of(
    st.binary(max_size=300),
    st.integers(0, 255).map(lambda byte: bytes([byte]) * WINDOW_BYTES),
    st.randoms(use_true_random=False).map(lambda source: source.randbytes(WINDOW_BYTES)),
    st.binary(min_size=1, max_size=64).map(lambda part: (part * WINDOW_BYTES)[:WINDOW_BYTES]),
)


@FAST
@given(data=WINDOWS, level=st.integers(1, 12))
def test_chunk(data: bytes, level: int) -> None:
    """A chunk decodes to what was encoded and is at most a byte longer."""
    encoded = encode(data, level=level)
    assert decode(encoded) == data
    assert decode(memoryview(encoded)) == data
    assert len(encoded) <= len(data) + 1


@FAST
@given(data=WINDOWS.filter(bool), level=st.integers(1, 12), at=st.data())
def test_spoilt_chunk(data: bytes, level: int, at: st.DataObject) -> None:
    """A chunk with another byte decodes to at most a window, or is refused; nothing else."""
    encoded = bytearray(encode(data, level=level))
    place = at.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= at.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(encoded))
    except (Damaged, Incompatible):
        return
    assert len(decoded) <= WINDOW_BYTES


@FAST
@given(garbage=st.binary(max_size=200))
def test_no_chunk(garbage: bytes) -> None:
    """Any bytes are a chunk of at most a window, or damaged."""
    try:
        decoded = decode(b"\x01" + garbage)
    except Damaged:
        return
    assert len(decoded) <= WINDOW_BYTES


def test_chunk_beyond_a_window() -> None:
    """More than a window is no chunk, stored or compressed."""
    long = b"ab" * WINDOW_BYTES
    for encoded in (encode(long, level=3), b"\x00" + long, b"\x00" + bytes(WINDOW_BYTES + 1)):
        with pytest.raises(Damaged, match="too long"):
            decode(encoded)
    assert len(decode(b"\x00" + bytes(WINDOW_BYTES))) == WINDOW_BYTES


ONE_ID = bytes(ID_BYTES)
LENGTH = (100).to_bytes(2, "little")
PACK = bytes(PACK_ID_BYTES)
RUN = EncodedRun(0, 0, 16, LENGTH, ONE_ID)
BAD_MAPS = {
    "negative size": EncodedMap(-1, (PACK,), (RUN,)),
    "size": EncodedMap((1 << 44) + 1, (PACK,), (RUN,)),
    "short pack id": EncodedMap(WINDOW_BYTES, (PACK[1:],), (RUN,)),
    "pack twice": EncodedMap(WINDOW_BYTES, (PACK, PACK), (RUN,)),
    "pack that is not listed": EncodedMap(WINDOW_BYTES, (), (RUN,)),
    "negative pack": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, pack=-1),)),
    "negative window": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, first_window=-1),)),
    "window behind the end": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, first_window=1),)),
    "far window": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, first_window=1 << 63),)),
    "same window": EncodedMap(WINDOW_BYTES, (PACK,), (RUN, RUN)),
    "negative offset": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, offset=-1),)),
    "offset": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, offset=1 << 26),)),
    "far offset": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, offset=1 << 63),)),
    "no length": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, lengths=b""),)),
    "half a length": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, lengths=b"\1\0\1"),)),
    "length of zero": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, lengths=b"\0\0"),)),
    "largest length": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, lengths=b"\xff\xff"),)),
    "short id": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, ids=ONE_ID[1:]),)),
    "an id more": EncodedMap(WINDOW_BYTES, (PACK,), (replace(RUN, ids=ONE_ID * 2),)),
}


@pytest.mark.parametrize("bad", BAD_MAPS)
def test_bad_map(bad: str) -> None:
    """A map with a number that cannot be is damaged."""
    assert decode_map(EncodedMap(WINDOW_BYTES, (PACK,), (RUN,))).windows == 1
    with pytest.raises(Damaged, match="inconsistent"):
        decode_map(BAD_MAPS[bad])


@pytest.mark.parametrize(
    ("lengths", "ids"),
    [
        (LENGTH, ONE_ID[1:]),
        (LENGTH, ONE_ID * 2),
        (LENGTH[:1], ONE_ID),
        (LENGTH * 2, ONE_ID * 2),
        (b"", b""),
        ((0).to_bytes(2, "little") + LENGTH, ONE_ID * 2),
    ],
)
def test_bad_index(lengths: bytes, ids: bytes) -> None:
    """An index that does not describe its pack, or no pack at all, is damaged."""
    pack_bytes = len(PACK_HEADER) + 100
    assert len([*locate(IndexRecord(pack=PACK, lengths=LENGTH, ids=ONE_ID), pack_bytes)]) == 1
    with pytest.raises(Damaged):
        list(locate(IndexRecord(pack=PACK, lengths=lengths, ids=ids), pack_bytes))


def test_longer_body_than_its_kind_may_have() -> None:
    """A record that is not compressed is no longer than its kind allows either."""
    ring = plain_keyring()
    for length in (4000, 4200):
        record = {"purpose": "x" * length, "beats": 0}
        data = seal_raw(ring.current, Kind.LEASE, "leases/a", record)
        if length < LIMITS[Kind.LEASE]:
            unseal(ring, "leases/a", data, LeaseRecord)
        else:
            with pytest.raises(Damaged, match="a body of"):
                unseal(ring, "leases/a", data, LeaseRecord)


@FAST
@given(domain=DOMAINS, data=WINDOWS)
def test_sealed_chunk(domain: Domain, data: bytes) -> None:
    """Equal content is sealed equally, opens again, and is never longer than the format says."""
    chunk_id = domain.chunk_id(data)
    sealed = domain.seal_chunk(chunk_id, encode(data, level=3))
    assert sealed == domain.seal_chunk(chunk_id, encode(data, level=3))
    assert decode(domain.open_chunk(chunk_id, sealed)) == data
    assert len(sealed) <= LONGEST_BYTES
    assert len(chunk_id) == ID_BYTES


@FAST
@given(
    keys=st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=2, unique=True),
    data=WINDOWS.filter(lambda data: len(data) >= 16),
)
def test_two_domains(keys: list[bytes], data: bytes) -> None:
    """Of the same content two domains make another id and another ciphertext; neither opens it."""
    left, right = map(SealedDomain, keys)
    encoded = encode(data, level=3)
    ids = left.chunk_id(data), right.chunk_id(data)
    sealed = left.seal_chunk(ids[0], encoded), right.seal_chunk(ids[1], encoded)
    assert ids[0] != ids[1]
    assert not {sealed[0][at : at + 16] for at in range(0, len(sealed[0]) - 16)} & {
        sealed[1][at : at + 16] for at in range(0, len(sealed[1]) - 16)
    }
    with pytest.raises(Damaged):
        right.open_chunk(ids[0], sealed[0])


@st.composite
def _files(draw: st.DrawFn) -> tuple[int, list[Entry]]:
    """A file and entries for some of its windows, in runs and out of them, in a few packs."""
    packs = draw(
        st.lists(
            st.binary(min_size=PACK_ID_BYTES, max_size=PACK_ID_BYTES),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    windows = sorted(draw(st.sets(st.integers(0, 60), max_size=40)))
    entries: list[Entry] = []
    place = 16
    for window in windows:
        length = draw(st.integers(1, LONGEST_BYTES))
        if draw(st.booleans()):
            place = draw(st.integers(16, 1 << 20))
        pack = draw(st.sampled_from(packs))
        chunk_id = draw(st.binary(min_size=ID_BYTES, max_size=ID_BYTES))
        entries.append(Entry(window, chunk_id, Location(pack, place, length)))
        place += length
    last = windows[-1] if windows else -1
    size = (last + 1) * WINDOW_BYTES + draw(st.integers(0, 3 * WINDOW_BYTES))
    return size, entries


@FAST
@given(file=_files())
def test_file_map(file: tuple[int, list[Entry]]) -> None:
    """A map gives back every entry, by walking and by window, also after it was a record's."""
    size, entries = file
    encoded = msgspec.msgpack.decode(
        msgspec.msgpack.encode(encode_map(size, entries)), type=EncodedMap
    )
    decoded = decode_map(encoded)
    assert decoded.size_bytes == size
    assert [*decoded] == entries
    assert decoded.windows == len(entries)
    assert decoded.packs() == {entry.location.pack for entry in entries}
    by_window = {entry.window: entry for entry in entries}
    assert [decoded.get(window) for window in range(70)] == [by_window.get(w) for w in range(70)]
    ends = decoded.pack_ends()
    for entry in entries:
        assert entry.location.offset + entry.location.length <= ends[entry.location.pack]


@FAST
@given(
    domain=DOMAINS,
    file=_files(),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    name=st.text("abc/", min_size=1, max_size=20),
)
def test_record(domain: Domain, file: tuple[int, list[Entry]], digest: str, name: str) -> None:
    """A record opens under its own name and kind as what it was, and under no other."""
    record = ImageRecord(digest=Digest(digest), content=encode_map(*file))
    keyring = Keyring(domain)
    data = seal(domain, name, record)
    assert unseal(keyring, name, data, ImageRecord) == (record, domain)
    with pytest.raises(Damaged):
        unseal(keyring, f"{name}x", data, ImageRecord)
    with pytest.raises(Damaged):
        unseal(keyring, name, data, LeaseRecord)
