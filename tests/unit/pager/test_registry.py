"""What a pager keeps on disk for its successor, and which trials' windows count."""

from __future__ import annotations

import logging
import stat
from typing import TYPE_CHECKING

import msgspec
import pytest

from torpor.errors import NoSpace
from torpor.pager.logs import BoundedLog
from torpor.pager.registry import Entry, Registry
from torpor.pager.source import Source
from torpor.pager.trial import merge
from torpor.snapshot.repository.records import ImageLink, Link
from torpor.snapshot.windows import Touched
from torpor.units import Digest

if TYPE_CHECKING:
    from pathlib import Path

LINK = Link(key="k", size_bytes=3, hash=bytes(32))
DIGEST = Digest("a" * 64)
IMAGE = ImageLink(digest=Digest("b" * 64), size_bytes=7, record=LINK)
ENTRY = Entry(Source((("store", "file:///s"),), "the keys", plain=False), DIGEST, LINK, (IMAGE,))


def test_an_entry_comes_back(tmp_path: Path) -> None:
    """A successor reads what was written, replaced entries too, until it is removed."""
    Registry(tmp_path).add(ENTRY, b"an older manifest")
    Registry(tmp_path).add(ENTRY, b"the manifest")
    successor = Registry(tmp_path)
    assert list(successor.digests()) == [DIGEST]
    assert successor.read(DIGEST) == (ENTRY, b"the manifest")
    successor.remove(DIGEST)
    successor.remove(DIGEST)
    assert list(successor.digests()) == []


def test_secrets_are_for_root_alone(tmp_path: Path) -> None:
    """Every file is of mode 0600, every directory of mode 0700."""
    registry = Registry(tmp_path / "open")
    registry.add(ENTRY, b"the manifest")
    registry.add_image(IMAGE.digest, b"record")
    for path in (tmp_path / "open").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_what_a_dead_pager_was_writing(tmp_path: Path) -> None:
    """An entry that is not whole is none, and is removed."""
    registry = Registry(tmp_path)
    registry.add(ENTRY, b"m")
    half = tmp_path / "snapshots" / f".{DIGEST}"
    half.mkdir()
    (half / "entry").write_bytes(b"half")
    assert list(registry.digests()) == [DIGEST]
    assert not half.exists()


def test_a_damaged_entry(tmp_path: Path) -> None:
    """One that cannot be read says so."""
    registry = Registry(tmp_path)
    registry.add(ENTRY, b"m")
    (tmp_path / "snapshots" / DIGEST / "entry").write_bytes(b"\x00garbage")
    with pytest.raises(msgspec.MsgspecError):
        registry.read(DIGEST)
    (tmp_path / "snapshots" / DIGEST / "entry").unlink()
    with pytest.raises(FileNotFoundError):
        registry.read(DIGEST)


def test_images_are_kept_for_all_snapshots(tmp_path: Path) -> None:
    """An image's record outlives the snapshot with which it came, until it is removed."""
    registry = Registry(tmp_path)
    assert registry.image(IMAGE.digest) is None
    registry.add(ENTRY, b"m")
    registry.add_image(IMAGE.digest, b"record")
    registry.remove(DIGEST)
    assert Registry(tmp_path).image(IMAGE.digest) == b"record"
    registry.remove_image(IMAGE.digest)
    registry.remove_image(IMAGE.digest)
    assert registry.image(IMAGE.digest) is None


def test_no_room_for_an_entry(tmp_path: Path) -> None:
    """What cannot be written is an error that leaves nothing."""
    registry = Registry(tmp_path)
    (tmp_path / "snapshots").rmdir()
    (tmp_path / "snapshots").write_bytes(b"")
    with pytest.raises(NoSpace, match="could not be opened"):
        registry.add(ENTRY, b"m")
    assert (tmp_path / "snapshots").read_bytes() == b""


def touched(**files: tuple[int, ...]) -> tuple[Touched, ...]:
    """What a trial touched."""
    return tuple(Touched(name, windows) for name, windows in files.items())


def test_what_all_trials_touched() -> None:
    """Windows of every trial, in the order of the first, file by file."""
    first = touched(memory=(9, 2, 5, 7), image=(1, 0), app=(3,))
    second = touched(app=(), image=(0, 1, 2), memory=(7, 5, 1, 9))
    assert merge([first, second]) == touched(memory=(9, 5, 7), image=(1, 0), app=())
    assert merge([first]) == first
    assert merge([first, touched(memory=(2,))]) == touched(memory=(2,), image=(), app=())
    assert merge([first, second, touched(memory=(9, 7))]) == touched(
        memory=(9, 7), image=(), app=()
    )


def test_what_one_trial_touched() -> None:
    """It comes last, in the order of its touch, and is little beside what all touched."""
    both = tuple(range(100, 148))
    first = touched(memory=(7, *both, 5))
    second = touched(memory=(900, *reversed(both)))
    assert merge([first, second]) == touched(memory=(*both, 7, 5, 900))
    many = touched(memory=(*both, *range(500, 900)))
    assert merge([first, many]) == touched(memory=(*both, 7, 5, 500))


def test_the_log_stays_short(tmp_path: Path) -> None:
    """A log that got long is moved beside and begun anew; what was said last is in one of them."""
    path = tmp_path / "log"
    logger = logging.Logger("torpor.test")
    with path.open("a") as stream:
        handler = BoundedLog(path, longest_bytes=2000)
        handler.setStream(stream)
        logger.addHandler(handler)
        for number in range(200):
            logger.warning("line %d", number)
    assert path.stat().st_size < 2200
    assert (tmp_path / "log.1").stat().st_size < 2200
    lines = ((tmp_path / "log.1").read_text() + path.read_text()).splitlines()
    assert [line.rpartition(" ")[2] for line in lines][-10:] == [str(n) for n in range(190, 200)]
