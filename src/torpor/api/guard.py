"""What stands before the API on every listener: the token, and limits of what is taken."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Final

import msgspec

from torpor.api.problems import MEDIA_TYPE, problem_of
from torpor.errors import InvalidInput, NotAllowed, Overloaded, TorporError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY: Final = 64 * 1024 * 1024
MOST_AT_ONCE: Final = 500
LOCAL: Final = "torpor.local"
"""Key of a request's scope: whether it came over the node's own Unix socket."""


class Guard:
    """An ASGI application before another one.

    With a `token` every request must show it; without, all may ask: only the node's own socket,
    which the file system guards, is served so.
    """

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app, self._token = app, token
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._token is not None and not self._shows_token(headers):
            error = NotAllowed(
                "this needs the daemon's token",
                hint="send it as `Authorization: Bearer TOKEN`; it is the setting api_token",
            )
            await _refuse(send, error, (b"www-authenticate", b"Bearer"))
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            await _refuse(send, _too_large(), status=413)
            return
        if self._under_way >= MOST_AT_ONCE:
            await _refuse(
                send, Overloaded("too many requests are under way"), (b"retry-after", b"1")
            )
            return
        self._under_way += 1
        try:
            await self._pass_on({**scope, LOCAL: self._token is None}, receive, send)
        finally:
            self._under_way -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def receive_limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > LARGEST_BODY:
                raise _too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _shows_token(self, headers: dict[bytes, bytes]) -> bool:
        assert self._token is not None
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(shown, self._token.encode())


def _too_large() -> InvalidInput:
    return InvalidInput(
        f"the request's body is larger than {LARGEST_BODY} bytes",
        hint="send large bodies to the function through the gateway",
    )


async def _refuse(
    send: Send, error: TorporError, *headers: tuple[bytes, bytes], status: int | None = None
) -> None:
    problem = problem_of(error, status=status)
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [(b"content-type", MEDIA_TYPE.encode()), *headers],
        }
    )
    await send({"type": "http.response.body", "body": msgspec.json.encode(problem)})
