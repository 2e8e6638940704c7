"""A request's body on its way: kept while nobody takes it, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_KEPT_BYTES: Final = 256 * 1024


class BodySink(Protocol):
    """Who takes a body. It holds the client's reading when it has enough."""

    def send_body(self, data: bytes) -> None:
        """The next piece."""

    def end_body(self) -> None:
        """That was all."""


class Body:
    """The body of one request, from the client's parser to a sink."""

    def __init__(self, hold: Callable[[str, bool], None]) -> None:
        """`hold(reason, wanted)` pauses and resumes the client's reading."""
        self.ended = False
        self.size_bytes = 0
        self._hold = hold
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._sink: BodySink | None = None

    def feed(self, data: bytes) -> None:
        """The next piece of it arrived."""
        self.size_bytes += len(data)
        if self._sink is not None:
            self._sink.send_body(data)
            return
        self._kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes > _MOST_KEPT_BYTES:
            self._hold("body", True)

    def end(self) -> None:
        """All of it arrived."""
        self.ended = True
        if self._sink is not None:
            self._sink.end_body()

    def attach(self, sink: BodySink) -> None:
        """Give all to `sink`, from the beginning."""
        self._sink = sink
        for data in self._kept:
            sink.send_body(data)
        if self.ended:
            sink.end_body()
        self._kept.clear()
        self._hold("body", False)

    def discard(self) -> None:
        """Nobody wants it any more: what comes is thrown away."""
        self._kept.clear()
        self._sink = _Nobody()
        self._hold("body", False)


class _Nobody:
    def send_body(self, data: bytes) -> None:
        """Throw it away."""

    def end_body(self) -> None:
        """Nothing is to be done."""
