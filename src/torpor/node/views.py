"""What is told of a node: one JSON document each, the same from a command and from the API.

Sizes in bytes, durations in seconds, moments in nanoseconds of CLOCK_REALTIME.
"""

from __future__ import annotations

from typing import Any

import msgspec


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all of them."""


class FunctionView(View, frozen=True, kw_only=True):
    """A function, its snapshot, and how many instances it has.

    `store` is empty, or with `snapshots = "remote"`: stored, pending (the node is ahead of the
    bucket), pending with the last error, or lost and who won.
    """

    name: str
    revision: int
    snapshot: str
    port: int
    memory_bytes: int
    disk_usage_bytes: int
    instances: int
    store: str = ""


class RevisionView(View, frozen=True, kw_only=True):
    """A revision of a function of which this node has a snapshot."""

    function: str
    revision: int
    refreshed: int
    snapshot: str
    created_ns: int
    current: bool


class InstanceView(View, frozen=True, kw_only=True):
    """An instance as the journal knows it; `pid` is its VMM's.

    Beside the journal's states there is `stalled`: it found the disk full, which still is so.
    """

    id: str
    function: str
    state: str
    address: str
    port: int
    slot: int | None
    snapshot: str
    pid: int | None
    created_ns: int


class SnapshotView(View, frozen=True, kw_only=True):
    """A snapshot on this node."""

    snapshot: str
    kind: str
    names: tuple[str, ...]
    function: str | None
    parent: str | None
    image: str
    memory_bytes: int
    nonzero_bytes: int
    vmstate_bytes: int
    disk_data_bytes: int
    disk_usage_bytes: int


class UnreadableView(View, frozen=True, kw_only=True):
    """A snapshot on this node that cannot be read, of a newer format or damaged, and why."""

    snapshot: str
    kind: str
    names: tuple[str, ...]
    reason: str
    disk_usage_bytes: int


class DeployedView(View, frozen=True, kw_only=True):
    """What a deploy made, and where the time went."""

    function: str
    revision: int
    snapshot: str
    base_reused: bool
    pause_s: float
    written_bytes: int
    memory_bytes: int
    nonzero_bytes: int
    image_bytes: int
    steps_s: dict[str, float]


class InvokedView(View, frozen=True, kw_only=True):
    """What a function answered; `body` is base64 in JSON. `woken`: an instance was, for it."""

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    instance: str
    woken: bool
    steps_s: dict[str, float]
    trace: dict[str, Any] | None = None


class RestoredView(View, frozen=True, kw_only=True):
    """An instance that was woken, and where it answers."""

    instance: str
    address: str
    steps_s: dict[str, float]
    trace: dict[str, Any] | None = None


class CapturedView(View, frozen=True, kw_only=True):
    """A snapshot that was made; `working_set` is windows by file."""

    snapshot: str
    pause_s: float
    written_bytes: int
    steps_s: dict[str, float]
    working_set: dict[str, int]


class ForkedView(View, frozen=True, kw_only=True):
    """The clones of an instance, which stood still for `pause_s`."""

    instance: str
    snapshot: str
    pause_s: float
    clones: tuple[RestoredView, ...]


class RemovedView(View, frozen=True, kw_only=True):
    """A function that was deleted, and the instances that were stopped for it."""

    function: str
    stopped: tuple[str, ...]


class SnapshotRemovedView(View, frozen=True, kw_only=True):
    """A snapshot that was deleted."""

    snapshot: str


class StoppedView(View, frozen=True, kw_only=True):
    """Instances that were ended, by their whole ids."""

    stopped: tuple[str, ...]


class LogsView(View, frozen=True, kw_only=True):
    """The last lines of an instance's console."""

    instance: str
    lines: tuple[str, ...]


class TraceView(View, frozen=True, kw_only=True):
    """A wake since the daemon started: when its instance was ready, and its steps."""

    instance: str
    function: str
    at_ns: int
    ready_s: float
    steps_s: dict[str, float]


class StatusView(View, frozen=True, kw_only=True):
    """The daemon: its version, settings that matter to clients, and how far ahead of the store."""

    version: str
    home: str
    snapshots: str
    store: str
    gateway: str
    pid: int
    pending: tuple[str, ...]
