"""serve: the daemon of a node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Final

import typer

from torpor.cli.context import (
    Config,
    Debug,
    Home,
    Json,
    KeyFile,
    Plain,
    StoreUrl,
    VmmKind,
    keep,
    options,
    run_async,
)
from torpor.cli.lines import JsonLines, set_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Tracer

    from torpor.api.daemon import Daemon, Invocations
    from torpor.config import Settings
    from torpor.node.node import Node

log = logging.getLogger("torpor.serve")

_HURRY_S: Final = 3.0
"""What is undone after a second signal has so long; then only a store can hold this process."""


def serve(
    snapshots: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            callback=keep("snapshots"),
            help="off (always boot), local, or remote (the store is asked first, and fed).",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", callback=keep("gateway_listen"), help="Where invocations come."
        ),
    ] = None,
    api: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            callback=keep("api_listen"),
            help="The API on TCP too; needs the setting api_token.",
        ),
    ] = None,
    drain: Annotated[
        str | None,
        typer.Option(
            metavar="WAY", callback=keep("drain"), help="At SIGTERM: leave instances, or snapshot."
        ),
    ] = None,
    plain: Plain = False,
    key_file: KeyFile = None,
    home: Home = None,
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Stay, take invocations and API requests, and scale functions to zero and back.

    Instances that run are taken over. SIGTERM or Ctrl-C lets requests end and then this process,
    not the instances unless --drain snapshot; a second one hurries. While it runs, commands on the
    same home ask it.

    Example: torpor serve --debug --snapshots remote --store s3://functions/prod
    """

    async def main() -> int:
        try:
            await serve_until_signal()
        except asyncio.CancelledError:
            if not _is_asked_to_end():
                raise
            _say("ended")  # the signal came while it began, or one more while it ended
        return 0

    async def serve_until_signal() -> None:
        await asyncio.sleep(0)  # a signal that came already ends it here
        from torpor.api.daemon import Daemon

        settings = options.settings()
        set_up(as_json=settings.log_format == "json", debug=options.debug)

        with _tracer(settings) as tracer:

            def make_gateway(node: Node) -> Invocations | None:
                from torpor.gateway import Gateway

                listens = settings.gateway_listen
                return Gateway(node, settings, tracer=tracer) if listens else None

            async with Daemon.running(settings, make_gateway, tracer=tracer) as daemon:
                for address in daemon.addresses:
                    _say(f"API on {address}")
                gateway = daemon.state.gateway()
                _say(f"invocations on {gateway}" if gateway else "no invocations")
                await _until_signal(daemon)

    run_async(main)


def _is_asked_to_end() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _say(text: str) -> None:
    """A line on standard error; that may be a file on a full disk, which is no reason to end."""
    if any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers):
        log.info(text)
        return
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _tracer(settings: Settings) -> Iterator[Tracer | None]:
    if not settings.otlp_endpoint:
        yield None
        return
    from torpor.api.telemetry import exporting

    with exporting(settings.otlp_endpoint) as tracer:
        yield tracer


async def _until_signal(daemon: Daemon) -> None:
    """Wait for the first signal, drain, and hurry at any other. Signals cancel this task."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        _say("draining; another signal hurries")
    draining = asyncio.ensure_future(daemon.drain())
    while not draining.done():
        try:
            await asyncio.wait((draining,))
        except asyncio.CancelledError:
            daemon.hurry()
            _leave_soon()
    draining.result()


def _leave_soon() -> None:
    """End this process soon even if a store is silent: a request to it cannot be broken off.

    A daemon may be killed at any moment, so nothing is lost by that.
    """
    leaving = threading.Timer(_HURRY_S, _leave)
    leaving.daemon = True
    leaving.start()


def _leave() -> None:
    _say("ended; what was still under way is left to the next daemon")
    os._exit(0)
