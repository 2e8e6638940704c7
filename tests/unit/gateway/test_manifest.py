"""A function's scale in the manifest."""

from __future__ import annotations

import msgspec
import pytest

from torpor.snapshot.manifest import Function, Scale
from torpor.units import Digest

APP = Digest("a" * 64)


def test_functions_without_a_scale_are_encoded_as_ever() -> None:
    """Their snapshots keep their digests, and what was written before is read."""
    old = b'{"app":"%b","name":"f","port":80,"revision":1}' % (b"a" * 64)
    assert msgspec.json.encode(Function("f", 1, 80, APP), order="sorted") == old
    assert msgspec.json.decode(old, type=Function) == Function("f", 1, 80, APP)


@pytest.mark.parametrize("refreshed", [0, 3])
def test_scale_travels(refreshed: int) -> None:
    """What is written is read."""
    function = Function("f", 1, 80, APP, Scale(max=3, snapshot="on-idle"), refreshed)
    encoded = msgspec.json.encode(function, order="sorted")
    assert msgspec.json.decode(encoded, type=Function) == function
