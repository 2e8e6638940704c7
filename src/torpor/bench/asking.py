"""One request on a connection of its own, as many at once as there are tasks."""

from __future__ import annotations

import asyncio
import time

from torpor.errors import FunctionFailed


async def get(address: tuple[str, int], path: str) -> float:
    """GET a path; the seconds to the end of the answer. Raises FunctionFailed unless it is 200."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200 "):
        words = answer[:500].decode("latin-1")
        raise FunctionFailed(f"there was no answer to GET {path}", reason=words)
    return time.perf_counter() - began
