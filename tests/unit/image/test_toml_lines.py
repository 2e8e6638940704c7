"""The line of every key and array element of a TOML text."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.image.toml_lines import _Scanner, find_line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("a",), 1),
        (("t", "b"), 6),
        (("t", "c"), 7),
        (("r", 0, "x"), 10),
        (("r", 1, "x"), 13),
        (("r", 1), 12),
        (("t", "unknown"), 5),
        (("nothing",), 1),
        (("a", 1), 3),
        (("r", 1, "s", "y"), 15),
        (("r", 1, "s", "z", "q", 1, "k"), 18),
        (("r", 1, "s", "w.v", "u"), 20),
    ],
)
def test_find_line(path: tuple[str | int, ...], line: int) -> None:
    """Lines of keys in tables, arrays of tables and after values of several lines."""
    text = 'a = [\n  "[t]",\n  "b = 1",\n]\n[t]\nb = 1\nc = """\nb = 2"""\n'
    text += "[[r]]\nx = 1\n\n[[r]]\nx = 2\n[r.s]\ny = 1\n"
    text += "z = { p = 1, q = [\n1,\n{ k = 2 }, # ]\n] }\n'w.v'.u = 1979-05-27 07:32:00Z\n"
    assert find_line(text, path) == line


NAMES = st.text("ab", min_size=1, max_size=2)
VALUES = st.recursive(
    st.sampled_from(
        ["1", "-2.5", "true", "07:32:00", '"a]"', "'{b'", '"""c\n= "" #"""', "'''\n'''"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.tuples(NAMES, inner), max_size=3, unique_by=lambda pair: pair[0])
    ),
    max_leaves=6,
)


def written(value: Any, blank: str) -> str:  # noqa: ANN401
    """A value as TOML, arrays with `blank` between their tokens."""
    if isinstance(value, str):
        return value
    if value and isinstance(value[0], tuple):
        return "{ " + ", ".join(f"{key} = {written(one, blank)}" for key, one in value) + " }"
    return f"[{blank}" + f"{blank},{blank}".join(written(one, blank) for one in value) + f"{blank}]"


def places_of(value: Any, place: tuple[str | int, ...]) -> set[tuple[str | int, ...]]:  # noqa: ANN401
    """The places of all that is inside a parsed value."""
    if not isinstance(value, dict | list):
        return {place}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place}.union(*(places_of(one, (*place, key)) for key, one in items))


@given(st.lists(st.tuples(NAMES, VALUES), max_size=4), st.sampled_from(["", "\n", " # ]\n\t"]))
def test_every_value_has_its_line(pairs: list[tuple[str, Any]], blank: str) -> None:
    """The scanner goes through any value as tomllib does: same keys, same elements, in order."""
    text = ""
    starts = {}
    for number, (key, value) in enumerate(pairs):
        starts[f"{key}{number}"] = text.count("\n") + 1
        text += f"{key}{number} = {written(value, blank)}\n"
    parsed = tomllib.loads(text)
    found = [place for _, place in _Scanner(text).places()]
    assert len(found) == len(set(found))
    assert set(found) == places_of(parsed, ()) - {()}
    for key, line in starts.items():
        assert find_line(text, (key,)) == line
