"""Sparse files against a plain model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.host.sparse import (
    blake3_file,
    copy_sparse,
    describe_sparse,
    hash_extents,
    is_zero_outside,
    write_page_runs,
)

PAGES = 24
PAGE = 4096

contents = st.lists(st.sampled_from([None, 0, 1, 2]), min_size=PAGES, max_size=PAGES)


def write(path: Path, pages: list[int | None]) -> None:
    """A file with holes (None), zero pages and others."""
    with path.open("wb") as stream:
        stream.truncate(PAGES * PAGE)
        for number, value in enumerate(pages):
            if value is not None:
                stream.seek(number * PAGE)
                stream.write(bytes([value]) * PAGE)


@settings(max_examples=40, deadline=None)
@given(parent=contents, written=contents)
def test_written_pages_over_a_parent(parent: list[int | None], written: list[int | None]) -> None:
    """Parent plus written runs gives what a plain copy gives; zero pages are described as holes."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory / "parent", parent)
        copy_sparse(directory / "parent", directory / "memory")
        runs, data = [], b""
        for number, value in enumerate(written):
            if value is not None:
                runs.append((number * PAGE, PAGE))
                data += bytes([value]) * PAGE
        (directory / "data").write_bytes(data)
        with (
            (directory / "memory").open("r+b") as target,
            (directory / "data").open("rb") as source,
        ):
            write_page_runs(target.fileno(), runs, source.fileno())
        model = [p if w is None else w for p, w in zip(parent, written, strict=True)]
        expected = b"".join(bytes([value or 0]) * PAGE for value in model)
        assert (directory / "memory").read_bytes() == expected
        content = describe_sparse(directory / "memory")
        covered = {
            page
            for offset, length in content.extents
            for page in range(offset // PAGE, (offset + length) // PAGE)
        }
        assert covered == {number for number, value in enumerate(model) if value}
        assert content.digest == hash_extents(directory / "memory", content.extents)
        copy_sparse(directory / "memory", directory / "copy")
        assert blake3_file(directory / "copy") == blake3_file(directory / "memory")


@settings(max_examples=60, deadline=None)
@given(pages=contents, chosen=st.lists(st.booleans(), min_size=PAGES, max_size=PAGES))
def test_zeros_outside_extents(pages: list[int | None], chosen: list[bool]) -> None:
    """Any byte that is not zero and in no extent is found; zeros and data in extents are not."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "file"
        write(path, pages)
        extents: list[tuple[int, int]] = []
        for number, inside in enumerate(chosen):
            if inside and extents and sum(extents[-1]) == number * PAGE:
                extents[-1] = (extents[-1][0], extents[-1][1] + PAGE)
            elif inside:
                extents.append((number * PAGE, PAGE))
        expected = not any(
            value and not inside for value, inside in zip(pages, chosen, strict=True)
        )
        assert is_zero_outside(path, extents) == expected
