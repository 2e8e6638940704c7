"""What the operations of the API work with: one node, and what its daemon knows beside it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from opentelemetry.trace import Tracer

from torpor import __version__
from torpor.api.idempotency import Once
from torpor.api.spans import Woke
from torpor.node.node import Node
from torpor.node.parts import Reporter
from torpor.node.service import LocalService, view_instance
from torpor.node.views import InstanceView, StatusView, TraceView


@dataclass
class State:
    """Belongs to the daemon's loop. `closing` ends what would stream for ever.

    `gateway` tells where invocations are taken, empty if they are not. With a `tracer` what makes
    something has spans.
    """

    node: Node
    once: Once
    gateway: Callable[[], str] = lambda: ""
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    tracer: Tracer | None = None

    def service(self, reporter: Reporter | None = None, woke: Woke | None = None) -> LocalService:
        """The node for one request, whose progress goes to `reporter`, and wakes to `woke`."""
        if reporter is None:
            return LocalService(self.node, woke)
        return LocalService(Node(replace(self.node.parts, reporter=reporter)), woke)

    def instance(self, reference: str) -> InstanceView:
        """One instance. Blocking. Raises NotFound, Conflict for several."""
        return view_instance(self.node.parts.journal.instance(reference))

    def traces(self) -> list[TraceView]:
        """The wakes that are remembered, latest last."""
        return [
            TraceView(
                instance=event.subject,
                function=event.data["function"],
                at_ns=event.at_ns,
                ready_s=event.data["ready_s"],
                steps_s=event.data["steps_s"],
            )
            for event in self.node.parts.events.since()
            if event.kind == "instance.ready"
        ]

    def status(self) -> StatusView:
        """What this daemon is. Blocking."""
        settings = self.node.parts.settings
        pending = [r.name for r in self.node.remote.rows.rows() if r.state == "pending"]
        return StatusView(
            version=__version__,
            home=str(settings.home.absolute()),
            snapshots=settings.snapshots,
            store=settings.store_url(),
            gateway=self.gateway(),
            pid=os.getpid(),
            pending=tuple(pending),
        )
