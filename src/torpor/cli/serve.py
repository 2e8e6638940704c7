"""serve: the daemon of a node."""

from __future__ import annotations

import asyncio
import contextlib
import json as json_module
import logging
import re
import sys
import time
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
    keep,
    options,
    run_async,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Tracer

    from torpor.api.daemon import Daemon, Invocations
    from torpor.config import Settings
    from torpor.node.node import Node

log = logging.getLogger("torpor.serve")

_PAIR: Final = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=(.*?)(?=\s[A-Za-z_]\w*=|$)")
_TEXT: Final = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"


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
        _set_up_logging(as_json=settings.log_format == "json")

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
    if any(isinstance(handler.formatter, _JsonLines) for handler in logging.root.handlers):
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
    draining.result()


class _JsonLines(logging.Formatter):
    """One JSON object a line; what is written key=value in a message becomes members too."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line = {
            **dict(_PAIR.findall(message)),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json_module.dumps(line)


def _set_up_logging(*, as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter(_TEXT))
    level = logging.DEBUG if options.debug else logging.INFO
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in ("asyncio", "uvicorn", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
