"""The limit of requests under way, in front of an application that takes its time."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from torpor.api.guard import MOST_AT_ONCE, Guard

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send


async def test_too_many_at_once() -> None:
    """One more than may be under way is a problem with Retry-After; after their end it is taken."""
    gate = asyncio.Event()
    answers: list[Message] = []

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        answers.append(message)

    guard = Guard(slow, token=None)
    scope = {"type": "http", "headers": []}
    asked = [asyncio.ensure_future(guard(scope, receive, send)) for _ in range(MOST_AT_ONCE)]
    await asyncio.sleep(0)
    await guard(scope, receive, send)
    start, body = answers
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert json.loads(body["body"])["type"] == "urn:torpor:error:Overloaded"
    gate.set()
    await asyncio.gather(*asked)
    await guard(scope, receive, send)
    assert len(answers) == 2
