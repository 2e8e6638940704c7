"""What a client can ask of a daemon, as data: so that both clients ask the same."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from torpor.node.events import Event
from torpor.node.invoke import Request
from torpor.node.views import (
    CapturedView,
    DeployedView,
    ForkedView,
    FunctionView,
    InstanceView,
    InvokedView,
    LogsView,
    RemovedView,
    RestoredView,
    RevisionView,
    SnapshotRemovedView,
    SnapshotView,
    StatusView,
    StoppedView,
    TraceView,
    UnreadableView,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and the type of its answer. What makes something has a `key` and progress."""

    method: str
    path: str
    answer: type[T]
    query: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    key: str | None = None


def _make(path: str, answer: type[T], body: dict[str, Any] | None = None) -> Call[T]:
    key = secrets.token_hex(16)
    return Call("POST", path, answer, body={} if body is None else body, key=key)


def _at(kind: str, reference: str, *more: str) -> str:
    return "/".join(("/v1", kind, quote(reference, safe=""), *more))


def status() -> Call[StatusView]:
    """What the daemon is."""
    return Call("GET", "/v1/status", StatusView)


def functions() -> Call[list[FunctionView]]:
    """See Service."""
    return Call("GET", "/v1/functions", list[FunctionView])


def revisions(name: str) -> Call[list[RevisionView]]:
    """The revisions of a function that are on the node."""
    return Call("GET", _at("functions", name, "revisions"), list[RevisionView])


def instances() -> Call[list[InstanceView]]:
    """See Service."""
    return Call("GET", "/v1/instances", list[InstanceView])


def snapshots() -> Call[list[SnapshotView]]:
    """See Service."""
    return Call("GET", "/v1/snapshots", list[SnapshotView])


def unreadable() -> Call[list[UnreadableView]]:
    """See Service."""
    return Call("GET", "/v1/unreadable", list[UnreadableView])


def traces() -> Call[list[TraceView]]:
    """The wakes that the daemon remembers."""
    return Call("GET", "/v1/traces", list[TraceView])


def recent_events(*, after: int) -> Call[list[Event]]:
    """What the daemon remembers of what happened."""
    return Call("GET", "/v1/events/recent", list[Event], query={"after": after})


def deploy(directory: Path, *, name: str | None) -> Call[DeployedView]:
    """See Service."""
    body = {"directory": str(directory.absolute()), "name": name}
    return _make("/v1/functions", DeployedView, body)


def invoke(name: str, request: Request, *, keep: bool, trace: bool) -> Call[InvokedView]:
    """See Service."""
    body = None if request.body is None else base64.b64encode(request.body).decode()
    return _make(
        _at("functions", name, "invoke"),
        InvokedView,
        {
            "method": request.method,
            "path": request.path,
            "headers": [list(pair) for pair in request.headers],
            "body": body,
            "keep": keep,
            "trace": trace,
        },
    )


def remove_function(name: str) -> Call[RemovedView]:
    """See Service."""
    return Call("DELETE", _at("functions", name), RemovedView)


def restore(reference: str, *, expect: str | None, trace: bool) -> Call[RestoredView]:
    """See Service."""
    body = {"reference": reference, "expect": expect, "trace": trace}
    return _make("/v1/instances", RestoredView, body)


def fork(instance_id: str, *, count: int) -> Call[ForkedView]:
    """See Service."""
    return _make(_at("instances", instance_id, "fork"), ForkedView, {"count": count})


def stop(instance_ids: Sequence[str]) -> Call[StoppedView]:
    """See Service."""
    body = {"ids": list(instance_ids)}
    return Call("POST", "/v1/instances/stop", StoppedView, body=body)


def logs(instance_id: str, *, lines: int, follow: bool = False) -> Call[LogsView]:
    """See Service; `follow` answers lines."""
    query = {"lines": lines, "follow": str(follow).lower()}
    return Call("GET", _at("instances", instance_id, "logs"), LogsView, query=query)


def create_snapshot(instance_id: str, *, name: str | None, trial: bool) -> Call[CapturedView]:
    """See Service."""
    body = {"name": name, "trial": trial}
    return _make(_at("instances", instance_id, "snapshots"), CapturedView, body)


def remove_snapshot(reference: str) -> Call[SnapshotRemovedView]:
    """See Service."""
    return Call("DELETE", _at("snapshots", reference), SnapshotRemovedView)
