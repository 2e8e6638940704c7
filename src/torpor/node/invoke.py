"""One HTTP request to an instance, and the waiting for a function to answer its first."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torpor.errors import DeadlineExceeded, FunctionFailed, InvalidInput, VmmFailed
from torpor.host.cancel import in_thread, interruptible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.host.process import ProcessId

_LOOK_S: Final = 0.2


@dataclass(frozen=True)
class Response:
    """What a function answered."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    duration_s: float


@dataclass(frozen=True)
class Request:
    """What is asked of a function."""

    method: str = "GET"
    path: str = "/"
    headers: Sequence[tuple[str, str]] = ()
    body: bytes | None = None


async def send_while_alive(
    vmm: ProcessId | None, address: str, port: int, request: Request, *, timeout_s: float
) -> Response:
    """As `send_request`, in a thread, and no longer than the function's VMM lives.

    A VM that is killed closes no connection. Raises VmmFailed then.
    """
    sending = asyncio.ensure_future(
        in_thread(send_request, address, port, request, timeout_s=timeout_s)
    )
    try:
        while not sending.done():
            dead = vmm is not None and not vmm.is_alive()
            await asyncio.wait({sending}, timeout=_LOOK_S)  # what it answered may be on its way
            if dead and not sending.done():
                raise VmmFailed(f"the VM ended during {request.method} {request.path}")
        return sending.result()
    finally:
        sending.cancel()
        while not sending.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({sending})


def send_request(address: str, port: int, request: Request, *, timeout_s: float) -> Response:
    """Send one request and read the whole answer. Blocking.

    Raises FunctionFailed when the function refuses, drops or garbles the connection,
    DeadlineExceeded when it is silent for `timeout_s`, InvalidInput for a malformed request.
    Stops when the work that it is part of is cancelled (`host.cancel`).
    """
    what = f"{request.method} {request.path}"
    began = time.perf_counter()
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    connection.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.sock.settimeout(timeout_s)
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        with interruptible(connection.sock):
            connection.sock.connect((address, port))
            answer, body = _exchange(connection, request)
    except (http.client.InvalidURL, ValueError) as error:
        raise InvalidInput(f"cannot send {what!r}", reason=str(error)) from None
    except TimeoutError:
        raise DeadlineExceeded(
            f"no answer to {what} within {timeout_s:.0f} s",
            hint="look at `torpor logs`, or raise request_timeout_s",
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise FunctionFailed(
            f"the function did not answer {what}", reason=str(error) or type(error).__name__
        ) from None
    finally:
        connection.close()
    return Response(
        answer.status,
        answer.reason,
        tuple(answer.getheaders()),
        body,
        time.perf_counter() - began,
    )


def _exchange(
    connection: http.client.HTTPConnection, request: Request
) -> tuple[http.client.HTTPResponse, bytes]:
    connection.putrequest(request.method, request.path)
    for name, value in _with_length(request):
        connection.putheader(name, value)
    connection.endheaders(request.body)
    answer = connection.getresponse()
    return answer, answer.read()


def _with_length(request: Request) -> list[tuple[str, str]]:
    headers = list(request.headers)
    given = {name.lower() for name, _ in headers}
    if request.body is not None and "content-length" not in given:
        headers.append(("Content-Length", str(len(request.body))))
    if "user-agent" not in given:
        headers.append(("User-Agent", "torpor"))
    return headers
