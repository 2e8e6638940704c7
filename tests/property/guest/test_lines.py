"""Lines of the guest protocol survive any content, and any content survives as a line."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from torpor.errors import Damaged, InvalidInput
from torpor.image.agent import (
    ErrorReply,
    OkReply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=12)
fields = st.lists(st.tuples(words, st.binary(max_size=200)), max_size=8).map(tuple)
messages = st.binary(max_size=200).map(lambda raw: raw.decode(errors="surrogateescape"))
replies = st.one_of(
    st.builds(OkReply, fields),
    st.builds(ErrorReply, messages, st.sampled_from(["guest", "function"])),
)


@given(st.builds(Request, words, fields))
def test_request_round_trip(request: Request) -> None:
    """What is encoded is one printable line, and decodes to the same request."""
    line = encode_request(request)
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert decode_request(line[:-1]) == request


@given(replies)
def test_reply_round_trip(reply: OkReply | ErrorReply) -> None:
    """Replies of both kinds come back as they were."""
    line = encode_reply(reply)
    assert line.count(b"\n") == 1
    assert decode_reply(line[:-1]) == reply


garbage = st.one_of(
    st.binary(max_size=300),
    st.text("abc =%0aFerokult\n\t", max_size=80).map(str.encode),
    st.text("=% 0aF", max_size=20).map(lambda text: f"ok a={text}".encode()),
    st.text("=% 0aF", max_size=20).map(lambda text: f"error {text}".encode()),
)


@given(garbage, st.sampled_from([decode_reply, decode_request]))
def test_garbage_is_decoded_or_refused(line: bytes, decode: Callable[[bytes], object]) -> None:
    """The decoders raise Damaged and nothing else."""
    with contextlib.suppress(Damaged):
        decode(line)


@given(st.integers(65_000, 200_000))
def test_no_line_is_over_the_limit(size: int) -> None:
    """A request that the agent would refuse for its length is refused before it is sent."""
    request = Request("run", (("arg", b"x" * size),))
    with contextlib.suppress(InvalidInput):
        assert len(encode_request(request)) <= 65_536
