"""Encodings of the repository: whatever goes in comes out, and nothing else is taken."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.errors import Damaged, Incompatible
from torpor.snapshot.repository.chunks import ID_BYTES, LONGEST_BYTES, decode, encode
from torpor.snapshot.repository.domain import Domain, PlainDomain, SealedDomain
from torpor.snapshot.repository.filemap import (
    PACK_ID_BYTES,
    EncodedMap,
    Entry,
    Location,
    decode_map,
    encode_map,
)
from torpor.snapshot.repository.keys import Keyring
from torpor.snapshot.repository.records import ImageRecord, LeaseRecord, seal, unseal
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
