"""The background uploads of a node: what the journal says that the store should have.

What commands beside the daemon deploy or remove is found there too. Nothing of it is in this
process's memory, so a daemon that is killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from torpor.errors import Conflict, TorporError
from torpor.host.cancel import in_thread
from torpor.node.parts import log

if TYPE_CHECKING:
    from torpor.node.node import Node
    from torpor.node.tables import RemoteRow

_LOOK_AGAIN_S: Final = 0.5
_AFTER_ERROR_S: Final = 2.0


class Uploader:
    """Brings the store up to the node, one name at a time. Belongs to one asyncio loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._remote = node.remote
        self._events = node.parts.events

    async def run(self) -> None:
        """Upload until cancelled; what is cut off is pending still."""
        if not self._remote.active:
            return
        while True:
            try:
                for row in await in_thread(self._due):
                    await self._upload(row)
                wait_s = _LOOK_AGAIN_S
            except TorporError as error:  # such as a full disk that takes no result of a try
                log.error("pending uploads cannot be looked at error=%s", error)
                wait_s = _AFTER_ERROR_S
            except Exception:  # ours: the next ones are uploaded all the same
                log.exception("an upload failed")
                wait_s = _AFTER_ERROR_S
            await asyncio.sleep(wait_s)

    async def _upload(self, row: RemoteRow) -> None:
        try:
            await in_thread(self._remote.upload, row)
        except Conflict as error:
            log.error("lost to another node name=%s error=%s", row.name, error)
            await in_thread(self._remote.rows.lost, row, str(error))
            self._events.publish("upload.lost", row.name, wanted=row.wanted, error=str(error))
        except TorporError as error:
            longest_s = self._node.parts.settings.upload_retry_s
            wait_s = await in_thread(
                self._remote.rows.failed, row, str(error), longest_wait_s=longest_s
            )
            log.warning(
                "the store is behind name=%s tries=%d again_in_s=%.0f error=%s",
                row.name,
                row.tries + 1,
                wait_s,
                error,
            )
            self._events.publish("upload.failed", row.name, wanted=row.wanted, error=str(error))
        else:
            log.info("stored name=%s digest=%s", row.name, row.wanted[:12] or "deleted")
            self._events.publish("upload.done", row.name, wanted=row.wanted)

    def _due(self) -> list[RemoteRow]:
        self._remote.find_drift()
        now_ns = time.time_ns()
        return [
            row
            for row in self._remote.rows.rows()
            if row.state == "pending" and row.due_ns <= now_ns
        ]
