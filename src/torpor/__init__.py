"""torpor: functions in microVMs that fall asleep as snapshots and wake on any node.

`Client` and `AsyncClient` ask the daemon of a node; they are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torpor.api.client import AsyncClient
    from torpor.api.sync_client import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Client":
        from torpor.api.sync_client import Client

        return Client
    if name == "AsyncClient":
        from torpor.api.client import AsyncClient

        return AsyncClient
    raise AttributeError(f"module 'torpor' has no attribute {name!r}")
