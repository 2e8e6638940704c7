"""/metrics: what Prometheus may know of a node.

Read when it is asked for, but for cold starts, which are counted as they happen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from torpor.errors import TorporError
from torpor.node.events import Event
from torpor.node.node import Node
from torpor.node.parts import log
from torpor.pager.control import PagerGone

_BUCKETS_S: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_CLASSES: Final = ("zero", "awaited", "cache", "store")


class FunctionCounts(Protocol):
    """What a gateway tells of one function."""

    @property
    def queued(self) -> int:
        """Requests that wait for an instance."""

    @property
    def in_flight(self) -> int:
        """Requests that an instance has."""

    @property
    def instances(self) -> int:
        """Instances that get requests."""

    @property
    def waking(self) -> int:
        """Wakes under way."""

    @property
    def wakes(self) -> Mapping[str, int]:
        """Wakes by how."""

    @property
    def responses(self) -> Mapping[str, int]:
        """Responses by status class."""


class GatewayCounts(Protocol):
    """What a gateway tells of itself."""

    @property
    def connections(self) -> int:
        """Open connections of clients."""

    @property
    def functions(self) -> Mapping[str, FunctionCounts]:
        """By name."""

    @property
    def refused(self) -> Mapping[int, int]:
        """Requests that meant no function, by status."""


class Metrics(Collector):
    """The metrics of one daemon. `gateway` gives its counts, None without one."""

    def __init__(self, node: Node, gateway: Callable[[], GatewayCounts | None]) -> None:
        self._node, self._gateway = node, gateway
        self._registry = CollectorRegistry()
        self._cold_starts = Histogram(
            "torpor_cold_start_seconds",
            "From the decision to wake until the instance is ready, by where its snapshot was.",
            ("source",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._registry.register(self)

    def hear(self, event: Event) -> None:
        """Count an event of the node. Any thread."""
        if event.kind == "instance.ready":
            source = source_of(event.data["steps_s"])
            self._cold_starts.labels(source).observe(event.data["ready_s"])

    def render(self) -> tuple[str, bytes]:
        """Content type and body. Blocking."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        try:
            yield from self._instances()
            yield from self._slots()
            yield from self._uploads()
        except TorporError as error:  # the journal is locked or gone: what else there is, is told
            log.warning("the node was not counted error=%s", error)
        yield from self._store()
        yield from self._pager()
        counts = self._gateway()
        if counts is not None:
            yield from _of_gateway(counts)

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are not checked beforehand."""
        return iter(())

    def _instances(self) -> Iterator[Metric]:
        rows = self._node.parts.journal.instances()
        family = GaugeMetricFamily(
            "torpor_instances", "Instances in the journal.", labels=("function", "state")
        )
        for (function, state), count in Counter((r.function, r.state) for r in rows).items():
            family.add_metric((function, state), count)
        yield family

    def _slots(self) -> Iterator[Metric]:
        states = Counter(record.state for record in self._node.parts.slots.list())
        family = GaugeMetricFamily(
            "torpor_slots",
            "Network slots of this host, by state; free ones are the pool.",
            labels=("state",),
        )
        for state in ("free", "used", "preparing", "removing"):
            family.add_metric((state,), states.get(state, 0))
        yield family

    def _uploads(self) -> Iterator[Metric]:
        states = Counter(row.state for row in self._node.remote.rows.rows())
        family = GaugeMetricFamily(
            "torpor_uploads",
            "Names by whether the store has them; pending: the node is ahead.",
            labels=("state",),
        )
        for state in ("pending", "stored", "lost"):
            family.add_metric((state,), states.get(state, 0))
        yield family

    def _store(self) -> Iterator[Metric]:
        counts = self._node.parts.store_counters.snapshot()
        yield _counter(
            "torpor_store_requests", "Requests to the store.", "operation", counts.requests
        )
        yield _counter("torpor_store_errors", "Requests that failed.", "error", counts.errors)
        moved = {"up": counts.bytes_up, "down": counts.bytes_down}
        yield _counter("torpor_store_bytes", "Content to and from the store.", "direction", moved)

    def _pager(self) -> Iterator[Metric]:
        client = self._node.paging.client
        try:
            counted: Mapping[str, Any] = client.counters() if client.is_running() else {}
        except PagerGone:
            counted = {}
        yield GaugeMetricFamily("torpor_pager_up", "Whether a pager runs.", value=bool(counted))
        if not counted:
            return
        files = [f for one in counted["snapshots"].values() for f in one["files"].values()]
        windows = {name: sum(f[name] for f in files) for name in ("pushed", *_CLASSES)}
        stalled = {name: sum(f["stalled_s"].get(name, 0.0) for f in files) for name in _CLASSES}
        # of what is open now: they fall when a snapshot is closed
        yield _gauge("torpor_pager_windows", "Windows of open snapshots.", "source", windows)
        yield _gauge("torpor_pager_stall_seconds", "Readers stood still.", "source", stalled)
        asked = counted["store"]
        yield CounterMetricFamily("torpor_pager_fetched_bytes", "Fetched.", value=asked["bytes"])
        yield CounterMetricFamily(
            "torpor_pager_requests", "Requests of the pager.", value=asked["requests"]
        )


def source_of(steps_s: Mapping[str, float]) -> str:
    """Where a woken snapshot was, by the steps of its wake; `boot` when none was used."""
    for step, source in (("boot", "boot"), ("open", "store-lazy"), ("pull", "store")):
        if step in steps_s:
            return source
    return "local"


def _of_gateway(counts: GatewayCounts) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "torpor_gateway_connections", "Open connections of clients.", value=counts.connections
    )
    refused = {str(status): count for status, count in counts.refused.items()}
    yield _counter("torpor_gateway_refused", "Requests that meant no function.", "status", refused)
    for what, text in (
        ("queued", "Requests that wait for an instance."),
        ("in_flight", "Requests that an instance has."),
        ("instances", "Instances that get requests."),
        ("waking", "Wakes under way."),
    ):
        values = {name: getattr(one, what) for name, one in counts.functions.items()}
        yield _gauge(f"torpor_gateway_{what}", text, "function", values)
    for what, label in (("wakes", "how"), ("responses", "status")):
        family = CounterMetricFamily(
            f"torpor_gateway_{what}", f"Sum of {what}.", labels=("function", label)
        )
        for name, one in counts.functions.items():
            for value, count in getattr(one, what).items():
                family.add_metric((name, value), count)
        yield family


def _counter(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family
