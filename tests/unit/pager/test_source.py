"""Sources: a node's settings as another process gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from torpor.config import Settings
from torpor.errors import InvalidInput, KeyMissing
from torpor.pager.source import Source, open_source
from torpor.snapshot.repository.keys import new_key_line
from torpor.snapshot.repository.records import Link, RefRecord, WakeLink, seal

if TYPE_CHECKING:
    from pathlib import Path

LINES = f"{new_key_line()}\n{new_key_line()}\n"


def travelled(source: Source) -> Source:
    """The source as it arrives over the socket."""
    return msgspec.convert(msgspec.json.decode(msgspec.json.encode(source)), Source)


def test_it_travels_whole(tmp_path: Path) -> None:
    """What a client sends is what the pager gets, equal and fit to be a key of a table."""
    settings = Settings(home=tmp_path, s3_access_key_id="id", s3_secret_access_key="secret")
    source = Source.of(settings, LINES)
    assert travelled(source) == source
    assert hash(travelled(source)) == hash(source)
    assert dict(source.settings)["store"] == f"file://{tmp_path}/store"


def test_it_opens_the_same_repository(tmp_path: Path) -> None:
    """Store and keys are the node's: what it seals, the other process opens."""
    settings = Settings(home=tmp_path, store=f"file://{tmp_path}/s", store_concurrency=3)
    opened = open_source(travelled(Source.of(settings, LINES)), deadline_s=7)
    opened.repository.store.put("refs/x", b"content")
    assert opened.store.get_range("refs/x", 0, 7) == b"content"
    assert (tmp_path / "s" / "refs" / "x").read_bytes() == b"content"
    assert len(opened.repository.keyring.others) == 1
    assert opened.repository.keyring.find(bytes(8)) is None


@pytest.mark.parametrize("plain", [False, True])
def test_plain_objects(tmp_path: Path, plain: bool) -> None:
    """With keys, plain objects are read only where the settings say so; without, only they."""
    settings = Settings(home=tmp_path, plain=plain)
    writer = open_source(Source.of(settings, ""), deadline_s=7).repository
    key = "refs/f"
    name = "0" * 32
    record = RefRecord(
        name="f",
        snapshot="a" * 64,  # type: ignore[arg-type]
        manifest=Link(key=f"snapshots/{name}/{name}/manifest", size_bytes=1, hash=bytes(32)),
        wake=WakeLink(
            key=f"snapshots/{name}/{name}/wake", size_bytes=1, header_bytes=1, hash=bytes(32)
        ),
        updated_ns=0,
    )
    writer.store.put(key, seal(writer.domain, key, record))
    assert writer.read_ref("f") is not None
    reader = open_source(Source.of(settings, LINES), deadline_s=7).repository
    if plain:
        assert reader.read_ref("f") is not None
    else:
        with pytest.raises(KeyMissing):
            reader.read_ref("f")


def test_settings_that_are_none(tmp_path: Path) -> None:
    """A store that cannot be is refused when it is opened."""
    source = Source((("store", "ftp://x"),), "", plain=False)
    with pytest.raises(InvalidInput, match="ftp"):
        open_source(source, deadline_s=1)
