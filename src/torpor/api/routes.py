"""The operations of the API, under /v1."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Query, Request, Response

from torpor.api.guard import LOCAL
from torpor.api.idempotency import fingerprint
from torpor.api.schemas import (
    DeployAsked,
    ForkAsked,
    InvokeAsked,
    Key,
    Reference,
    RestoreAsked,
    SnapshotAsked,
    StopAsked,
    says,
)
from torpor.api.spans import operation
from torpor.api.state import State
from torpor.api.streams import LINES, Streamed, progress_lines, server_sent
from torpor.errors import InvalidInput, NotAllowed, NotFound
from torpor.host.cancel import in_thread
from torpor.node.events import Event
from torpor.node.invoke import Request as Asked
from torpor.node.parts import Reporter, Silent
from torpor.node.service import LocalService, view_snapshot
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
from torpor.units import Digest

router = APIRouter(prefix="/v1")

Work = Callable[[LocalService], Awaitable[object]]


@router.get("/status", tags=["node"], **says(StatusView))
async def status(request: Request) -> Response:
    """What this daemon is."""
    return _json(await in_thread(_state(request).status))


# functions


@router.get("/functions", tags=["functions"], **says(FunctionView, many=True))
async def list_functions(request: Request) -> Response:
    """The functions of this node."""
    return _json(await _state(request).service().functions())


@router.post("/functions", tags=["functions"], **says(DeployedView, status=201, lines=True))
async def deploy(request: Request, asked: DeployAsked, key: Key = None) -> Response:
    """Deploy a function; only over the node's own socket, as it reads a directory of the host."""
    if not request.scope[LOCAL]:
        raise NotAllowed(
            "a directory of this host is deployed over the node's own socket only",
            hint="deploy on the node itself",
        )
    directory = Path(asked.directory)
    return await _create(
        request, key, lambda service: service.deploy(directory, name=asked.name), status=201
    )


@router.get("/functions/{name}", tags=["functions"], **says(FunctionView))
async def get_function(request: Request, name: Reference) -> Response:
    """One function."""
    found = [f for f in await _state(request).service().functions() if f.name == name]
    if not found:
        raise NotFound(f"there is no function {name!r}", hint="`torpor ls` lists them")
    return _json(found[0])


@router.delete("/functions/{name}", tags=["functions"], **says(RemovedView))
async def remove_function(request: Request, name: Reference) -> Response:
    """Delete a function; its instances are stopped."""
    return _json(await _state(request).service().remove_function(name))


@router.get("/functions/{name}/revisions", tags=["functions"], **says(RevisionView, many=True))
async def list_revisions(request: Request, name: Reference) -> Response:
    """The revisions of a function of which this node has a snapshot, latest first."""
    return _json(await _state(request).service().revisions(name))


@router.post("/functions/{name}/invoke", tags=["functions"], **says(InvokedView, lines=True))
async def invoke(
    request: Request, name: Reference, asked: InvokeAsked, key: Key = None
) -> Response:
    """Send one request to a function, waking it if it sleeps. Streams go through the gateway."""
    try:
        body = None if asked.body is None else base64.b64decode(asked.body, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput("body is not base64") from None
    headers = tuple((name, value) for name, value in asked.headers)
    sent = Asked(asked.method, asked.path, headers, body)
    return await _create(
        request,
        key,
        lambda service: service.invoke(name, sent, keep=asked.keep, trace=asked.trace),
    )


# instances


@router.get("/instances", tags=["instances"], **says(InstanceView, many=True))
async def list_instances(request: Request) -> Response:
    """The instances of this node; what is dead is removed first."""
    return _json(await _state(request).service().instances())


@router.post("/instances", tags=["instances"], **says(RestoredView, status=201, lines=True))
async def restore(request: Request, asked: RestoreAsked, key: Key = None) -> Response:
    """Wake a snapshot or function and leave the instance running."""
    expect = None if asked.expect is None else Digest(asked.expect)
    return await _create(
        request,
        key,
        lambda service: service.restore(asked.reference, expect=expect, trace=asked.trace),
        status=201,
    )


@router.post("/snapshots/{name}/restore", tags=["snapshots"], **says(RestoredView, status=201))
async def restore_snapshot(request: Request, name: Reference, key: Key = None) -> Response:
    """Wake a snapshot and leave the instance running."""
    return await _create(request, key, lambda service: service.restore(name), status=201)


@router.post("/instances/stop", tags=["instances"], **says(StoppedView))
async def stop_instances(request: Request, asked: StopAsked) -> Response:
    """End instances; none when one of them is not there."""
    return _json(StoppedView(stopped=tuple(await _state(request).service().stop(asked.ids))))


@router.get("/instances/{name}", tags=["instances"], **says(InstanceView))
async def get_instance(request: Request, name: Reference) -> Response:
    """One instance by id or its beginning."""
    return _json(await in_thread(_state(request).instance, name))


@router.delete("/instances/{name}", tags=["instances"], **says(StoppedView))
async def stop_instance(request: Request, name: Reference) -> Response:
    """End an instance; nothing of it is left."""
    return _json(StoppedView(stopped=tuple(await _state(request).service().stop([name]))))


@router.post("/instances/{name}/fork", tags=["instances"], **says(ForkedView, status=201))
async def fork(request: Request, name: Reference, asked: ForkAsked, key: Key = None) -> Response:
    """Make clones of a running instance, which stands still for one pause."""
    return await _create(
        request, key, lambda service: service.fork(name, count=asked.count), status=201
    )


@router.post("/instances/{name}/snapshots", tags=["instances"], **says(CapturedView, status=201))
async def create_snapshot(
    request: Request, name: Reference, asked: SnapshotAsked, key: Key = None
) -> Response:
    """Snapshot a running instance, which runs on."""
    return await _create(
        request,
        key,
        lambda service: service.create_snapshot(name, name=asked.name, trial=asked.trial),
        status=201,
    )


@router.get("/instances/{name}/logs", tags=["instances"], **says(LogsView, lines=True))
async def logs(
    request: Request,
    name: Reference,
    lines: Annotated[int, Query(ge=1, le=100_000)] = 1000,
    follow: bool = False,
) -> Response:
    """What an instance's console printed; `follow`: one JSON string a line, until it ends."""
    state = _state(request)
    if not follow:
        return _json(await state.service().logs(name, lines=lines))
    whole = await in_thread(state.instance, name)

    async def pieces() -> AsyncIterator[bytes]:
        async for line in state.service().follow_logs(whole.id, lines=lines):
            yield msgspec.json.encode(line) + b"\n"

    return Streamed(pieces, media_type=LINES, until=state.closing)


# snapshots


@router.get("/snapshots", tags=["snapshots"], **says(SnapshotView, many=True))
async def list_snapshots(request: Request) -> Response:
    """The snapshots of this node, bases too."""
    return _json(await _state(request).service().snapshots())


@router.get("/unreadable", tags=["snapshots"], **says(UnreadableView, many=True))
async def list_unreadable(request: Request) -> Response:
    """The snapshots of this node that cannot be read, of a newer format or damaged."""
    return _json(await _state(request).service().unreadable())


@router.get("/snapshots/{name}", tags=["snapshots"], **says(SnapshotView))
async def get_snapshot(request: Request, name: Reference) -> Response:
    """One snapshot by name, digest, or a digest's beginning."""
    return _json(view_snapshot(await _state(request).node.inspect(name)))


@router.delete("/snapshots/{name}", tags=["snapshots"], **says(SnapshotRemovedView))
async def remove_snapshot(request: Request, name: Reference) -> Response:
    """Delete a snapshot that is no function's."""
    digest = await _state(request).service().remove_snapshot(name)
    return _json(SnapshotRemovedView(snapshot=digest))


# seeing


@router.get("/events", tags=["seeing"], response_model=None)
async def events(
    request: Request,
    after: Annotated[int | None, Query(ge=0, description="Begin after this event.")] = None,
    last: Annotated[str | None, Header(alias="Last-Event-ID", pattern=r"^\d{1,18}$")] = None,
) -> Response:
    """What happens, as server-sent events; the last 1000 are remembered for who comes back."""
    state = _state(request)
    begin = after if last is None else int(last)

    async def pieces() -> AsyncIterator[bytes]:
        with state.node.parts.events.subscribed(after=begin) as queue:
            async for piece in server_sent(queue):
                yield piece

    return Streamed(pieces, media_type="text/event-stream", until=state.closing)


@router.get("/events/recent", tags=["seeing"], **says(Event, many=True))
async def recent_events(
    request: Request, after: Annotated[int, Query(ge=0, le=2**62)] = 0
) -> Response:
    """What happened, as far as it is remembered."""
    return _json(_state(request).node.parts.events.since(after))


@router.get("/traces", tags=["seeing"], **says(TraceView, many=True))
async def traces(request: Request) -> Response:
    """The wakes that are remembered, and where the time of each went."""
    return _json(_state(request).traces())


async def _create(request: Request, key: str | None, work: Work, *, status: int = 200) -> Response:
    """Do what makes something, once for each key; with progress if the client takes lines."""
    state = _state(request)
    asked = fingerprint(request.method, request.url.path, await request.body())

    async def done(reporter: Reporter) -> msgspec.Raw:
        name: str = request.scope["route"].name
        with operation(state.tracer, name, request.headers) as woke:
            return await state.once.do(key, asked, lambda: work(state.service(reporter, woke)))

    if LINES in request.headers.get("accept", ""):
        return Streamed(lambda: progress_lines(done), media_type=LINES)
    return _json(await done(Silent()), status=status)


def _state(request: Request) -> State:
    state: State = request.app.state.torpor
    return state


def _json(value: Any, *, status: int = 200) -> Response:  # noqa: ANN401
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")
