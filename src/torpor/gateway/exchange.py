"""One request and its response on their way through the gateway."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from torpor.errors import DeadlineExceeded, FunctionFailed
from torpor.gateway.heads import Framing, encode_interim, encode_response

if TYPE_CHECKING:
    from torpor.gateway.client import ClientConnection, Incoming
    from torpor.gateway.heads import ResponseHead
    from torpor.gateway.upstream import FunctionConnection

_LAST_CHUNK: Final = b"0\r\n\r\n"


class Exchange:
    """Sends a request's body to the function, and its response to the client.

    Both ways stop reading where the other side does not take it: memory stays constant.
    """

    def __init__(
        self,
        client: ClientConnection,
        incoming: Incoming,
        connection: FunctionConnection,
    ) -> None:
        self.status = 0
        self.head_at = 0.0
        self.complete = False
        self.keep_alive = incoming.head.keep_alive
        self._client = client
        self._incoming = incoming
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._out: list[bytes] = []
        self._framing: Framing = "none"
        self._active_at = self._loop.time()

    async def run(self, head: bytes, *, deadline_at: float, deadline_s: float) -> None:
        """Pass the request on and its response back.

        Raises FunctionFailed and DeadlineExceeded; if `status` is set by then, part of the response
        is at the client already.
        """
        incoming, connection = self._incoming, self._connection
        self._client.exchange = self
        try:
            connection.begin(self, method=incoming.head.method, head=head)
            connection.hold(self._client.full)
            incoming.body.attach(self)
            while not self._done.done():
                await asyncio.wait((self._done,), timeout=deadline_at - self._loop.time())
                if self._done.done():
                    break
                if self.status == 101:
                    deadline_at = self._loop.time() + 3600
                elif self.status and self._active_at + deadline_s > self._loop.time():
                    deadline_at = self._active_at + deadline_s
                else:
                    raise DeadlineExceeded(
                        f"the function did not answer within {deadline_s:g} s"
                        if not self.status
                        else f"nothing moved for {deadline_s:g} s"
                    )
            self._done.result()
            self.complete = True
        finally:
            self._client.exchange = None
            self._client.hold("function", False)
            if not self._done.done():
                self._done.cancel()

    @property
    def reusable(self) -> bool:
        """Whether the connection to the function is in order for another request."""
        return self.complete and self._incoming.body.ended and self.status != 101

    def hold_response(self, wanted: bool) -> None:
        """The client does not take what is written, or takes it again."""
        self._connection.hold(wanted)

    def tunnel(self, data: bytes) -> None:
        """What the client sends after it asked for an upgrade."""
        self._active_at = self._loop.time()
        self._connection.write(data)

    # BodySink

    def send_body(self, data: bytes) -> None:
        """See BodySink."""
        self._active_at = self._loop.time()
        if self._incoming.head.framing == "chunked":
            self._connection.write_all(b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._connection.write(data)

    def end_body(self) -> None:
        """See BodySink."""
        if self._incoming.head.framing == "chunked":
            self._connection.write(_LAST_CHUNK)

    # Receiver

    def on_interim(self, head: ResponseHead) -> None:
        """See Receiver."""
        if self._incoming.head.version == "1.1":
            self._out.append(encode_interim(head))

    def on_head(self, head: ResponseHead) -> None:
        """See Receiver."""
        incoming = self._incoming
        if head.status == 101 and not incoming.head.websocket:
            self.on_failure(FunctionFailed("the function switched protocols without being asked"))
            return
        self._framing = head.framing
        if head.framing in ("close", "chunked"):
            self._framing = "chunked" if incoming.head.version == "1.1" else "close"
        self.keep_alive = (
            incoming.head.keep_alive
            and incoming.body.ended
            and self._framing != "close"
            and not self._client.draining
        )
        self.status = head.status
        self.head_at = self._active_at = self._loop.time()
        self._out.append(
            encode_response(
                head,
                framing=self._framing,
                keep_alive=self.keep_alive,
                request_id=incoming.head.request_id,
            )
        )
        if head.status == 101:
            self.flush()
            self._client.open_tunnel()

    def on_data(self, data: bytes) -> None:
        """See Receiver."""
        self._active_at = self._loop.time()
        if self._framing == "chunked" and self.status != 101:
            self._out += (b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._out.append(data)

    def on_end(self) -> None:
        """See Receiver."""
        if self._framing == "chunked" and self.status != 101:
            self._out.append(_LAST_CHUNK)
        self.flush()
        if not self._done.done():
            self._done.set_result(None)

    def on_failure(self, error: FunctionFailed) -> None:
        """See Receiver."""
        if not self._done.done():
            self._done.set_exception(error)

    def flush(self) -> None:
        """See Receiver."""
        if self._done.done():
            self._out.clear()
        elif self._out:
            pieces, self._out = self._out, []
            self._client.write(b"".join(pieces) if len(pieces) > 1 else pieces[0])

    def hold_client(self, wanted: bool) -> None:
        """See Receiver."""
        self._client.hold("function", wanted)
