"""QMP: a thin layer over qemu.qmp that speaks torpor's errors.

The protocol is described in QEMU's docs/interop/qmp-spec.txt; the client library is asyncio, so
this is the one module of its room's neighbourhood that is too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from qemu.qmp import ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener

from torpor.errors import DeadlineExceeded, VmmFailed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # a dead VMM is reported by our errors

_ANSWER_TIMEOUT_S = 60.0


class Monitor:
    """A QMP session with one QEMU process; belongs to one asyncio loop."""

    def __init__(self, name: str) -> None:
        self._client = QMPClient(name)
        self._name = name

    async def connect(self, path: Path) -> None:
        """Connect and negotiate capabilities. Raises VmmFailed."""
        with _connected(path) as connection:
            await self._within(self._client.connect(connection), "the QMP greeting")

    async def execute(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401
        """Run one command and return what it returned. Raises VmmFailed with QEMU's words."""
        return await self._within(self._client.execute(command, arguments or None), command)

    async def send_descriptor(self, descriptor: int, name: str) -> None:
        """Give QEMU an open descriptor under a name (`getfd`). Raises VmmFailed."""
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", fdname=name)

    async def execute_until(
        self, command: str, arguments: dict[str, Any], *, event: str, statuses: Collection[str]
    ) -> str:
        """Run a command, then wait for an event whose status is one of `statuses`; returns it.

        Raises VmmFailed also when QEMU ends instead, which no listener is told of.
        """
        listener = EventListener(names=[event])
        with self._client.listen(listener):
            await self.execute(command, **arguments)
            return str(await self._within(self._status_or_end(listener, statuses), event))

    async def close(self) -> None:
        """End the session; QEMU goes on. Never raises for a session that is broken already."""
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError):
            return

    async def _status_or_end(self, listener: EventListener, statuses: Collection[str]) -> str:
        status = asyncio.ensure_future(_wait_for_status(listener, statuses))
        ended = asyncio.ensure_future(self._end())
        try:
            await asyncio.wait({status, ended}, return_when=asyncio.FIRST_COMPLETED)
            if status.done():
                return status.result()
            raise VmmFailed("QEMU ended the session")
        finally:
            status.cancel()
            ended.cancel()
            await asyncio.gather(status, ended, return_exceptions=True)

    async def _end(self) -> None:
        # looked at where the waiting begins: a change in between wakes nobody
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def _within(self, work: Any, what: str) -> Any:  # noqa: ANN401
        try:
            # not asyncio.wait_for: Python 3.11's loses a cancellation that meets the answer
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await work
        except ExecuteError as error:
            raise VmmFailed(f"QEMU refused {what}", reason=str(error)) from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"QEMU did not answer {what} within {_ANSWER_TIMEOUT_S:.0f} s"
            ) from None
        except (QMPError, OSError, EOFError) as error:
            raise VmmFailed(
                f"lost the connection to QEMU at {what}", reason=str(error) or type(error).__name__
            ) from None


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    """A connection to a Unix socket whose path may be longer than an address can hold."""
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(f"/proc/self/fd/{parent}/{path.name}")
        connection.setblocking(False)
        yield connection
    except OSError as error:
        connection.close()
        raise VmmFailed("cannot reach QEMU", reason=str(error)) from None
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(parent)


async def _wait_for_status(listener: EventListener, statuses: Collection[str]) -> str:
    async for message in listener:
        status = _status_of(message)
        if status in statuses:
            return status
    raise VmmFailed("QEMU ended the session")


def _status_of(message: Message) -> str:
    data = message.get("data")
    return str(data.get("status", "")) if isinstance(data, dict) else ""
