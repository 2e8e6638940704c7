"""deploy, invoke, ls, rm."""

from __future__ import annotations

import base64
import os
import selectors
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torpor.cli.context import Config, Debug, Home, Json, StoreUrl, options, with_node
from torpor.cli.output import print_json, print_table
from torpor.cli.trace import TraceOption, show_trace
from torpor.errors import InvalidInput
from torpor.host.cancel import checkpoint, current_token, in_thread
from torpor.units import format_duration, format_size

if TYPE_CHECKING:
    from torpor.node.catalogue import NamedSnapshot
    from torpor.node.deploy import Deployed
    from torpor.node.node import Invoked, Node

HTTP_ERROR = 22


def deploy(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where function.toml is.")],
    name: Annotated[str | None, typer.Option(help="Take the place of its name.")] = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Deploy a function: image, base, start, warm-up, snapshot.

    Example: torpor deploy examples/hello --name greeter
    """

    def show(deployed: Deployed) -> None:
        manifest = deployed.captured.snapshot.manifest
        data = {
            "function": deployed.name,
            "revision": deployed.revision,
            "snapshot": deployed.captured.snapshot.digest,
            "base_reused": deployed.base_reused,
            "pause_s": deployed.captured.pause_s,
            "written_bytes": deployed.captured.written_bytes,
            "memory_bytes": manifest.machine.memory_bytes,
            "nonzero_bytes": manifest.memory.data_bytes,
            "image_bytes": deployed.image_bytes,
            "steps_s": deployed.timeline.to_dict(),
        }
        if options.as_json:
            print_json(data)
            return
        rows = [
            ("function", f"{deployed.name}, revision {deployed.revision}"),
            ("snapshot", deployed.captured.snapshot.digest[:12]),
            (
                "memory",
                f"{format_size(manifest.memory.data_bytes)} of "
                f"{format_size(manifest.machine.memory_bytes)}",
            ),
            ("base", "reused" if deployed.base_reused else "made"),
            ("pause", format_duration(deployed.captured.pause_s)),
            *((step, format_duration(s)) for step, s in deployed.timeline.to_dict().items()),
        ]
        print_table(("", ""), rows, empty="")

    with_node(lambda node: node.deploy(directory, name=name), show)


def invoke(
    function: Annotated[str, typer.Argument(metavar="FN", help="A function, or any ref.")],
    path: Annotated[str, typer.Argument(help="Path and query.")] = "/",
    method: Annotated[str | None, typer.Option("-X", "--request", help="HTTP method.")] = None,
    data: Annotated[
        str | None, typer.Option("-d", "--data", help="Body; @FILE or @- reads it.")
    ] = None,
    header: Annotated[list[str] | None, typer.Option("-H", "--header", help="Name: value")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave a woken instance running.")] = False,
    include: Annotated[
        bool, typer.Option("-i", "--include", help="Print status and headers too.")
    ] = False,
    trace: TraceOption = False,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Send one request to a function, waking it if it sleeps, and print the body.

    Exit code 22 when the function answers with status 400 or more. --trace goes to standard error.

    Example: torpor invoke ledger -d '{"amount": 5}' -H 'Content-Type: application/json'
    """

    async def work(node: Node) -> Invoked:
        from torpor.node.invoke import Request

        body = None if data is None else await in_thread(_body, data)
        verb = method or ("GET" if body is None else "POST")
        headers = tuple(_header(text) for text in header or ())
        request = Request(verb, path, headers, body)
        return await node.invoke(function, request, keep=keep, trace=trace)

    def show(invoked: Invoked) -> int:
        response = invoked.response
        if options.as_json:
            print_json(_invoked(invoked))
        else:
            if include:
                sys.stdout.write(f"{response.status} {response.reason}\n")
                sys.stdout.write("".join(f"{name}: {value}\n" for name, value in response.headers))
                sys.stdout.write("\n")
            sys.stdout.flush()
            sys.stdout.buffer.write(response.body)
            if sys.stdout.isatty() and not response.body.endswith(b"\n"):
                sys.stdout.write("\n")
            if invoked.trace is not None:
                sys.stdout.flush()
                show_trace(invoked.trace, to=sys.stderr)
            elif trace:
                sys.stderr.write("nothing to trace: an instance was running\n")
        if response.status >= 400:
            sys.stderr.write(f"the function answered {response.status} {response.reason}\n")
            return HTTP_ERROR
        return 0

    with_node(work, show)


def list_functions(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the functions of this node.

    Example: torpor ls --json
    """

    async def work(node: Node) -> list[dict[str, Any]]:
        running = [row.function for row in node.parts.journal.instances()]
        return [
            _function(named, name, running) for named in node.functions() for name in named.names
        ]

    def show(rows: list[dict[str, Any]]) -> None:
        if options.as_json:
            print_json(rows)
            return
        cells = [
            (
                row["name"],
                row["revision"],
                row["snapshot"][:12],
                row["port"],
                format_size(row["memory_bytes"]),
                format_size(row["disk_usage_bytes"]),
                row["instances"],
            )
            for row in rows
        ]
        columns = ("NAME", "REVISION", "SNAPSHOT", "PORT", "MEMORY", "ON DISK", "INSTANCES")
        print_table(columns, cells, empty="no functions; `torpor deploy DIR` makes one")

    with_node(work, show)


def remove(
    functions: Annotated[list[str], typer.Argument(metavar="FN...", help="Functions to delete.")],
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete functions: their instances are stopped, their snapshots removed from this node.

    Example: torpor rm hello ledger
    """

    async def work(node: Node) -> list[dict[str, Any]]:
        return [
            {"function": name, "stopped": await node.remove_function(name)} for name in functions
        ]

    def show(rows: list[dict[str, Any]]) -> None:
        if options.as_json:
            print_json(rows)
        else:
            for row in rows:
                sys.stdout.write(f"{row['function']}\n")

    with_node(work, show)


def _body(text: str) -> bytes:
    if text == "@-":
        return _read_standard_input()
    if text.startswith("@"):
        try:
            return Path(text[1:]).read_bytes()
        except OSError as error:
            raise InvalidInput(f"cannot read {text[1:]}", reason=str(error)) from None
    return text.encode()


def _read_standard_input() -> bytes:
    """All of it, unless the command is interrupted while it waits for more."""
    pieces: list[bytes] = []
    token = current_token()
    with selectors.SelectSelector() as selector:  # files too, which epoll refuses
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
        if token is not None:
            selector.register(token.fd, selectors.EVENT_READ)
        while True:
            selector.select()
            checkpoint()
            piece = os.read(sys.stdin.fileno(), 1 << 20)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(":")
    if not separator or not name.strip():
        raise InvalidInput(f"not a header: {text!r}", hint="write it like 'Name: value'")
    return name.strip(), value.strip()


def _invoked(invoked: Invoked) -> dict[str, Any]:
    response = invoked.response
    try:
        body = {"body": response.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(response.body).decode()}
    return {
        "status": response.status,
        "headers": [list(pair) for pair in response.headers],
        **body,
        "instance": invoked.instance_id,
        "woken": invoked.woken,
        "steps_s": invoked.timeline.to_dict(),
        **({} if invoked.trace is None else {"trace": invoked.trace.to_dict()}),
    }


def _function(named: NamedSnapshot, name: str, running: list[str]) -> dict[str, Any]:
    manifest = named.snapshot.manifest
    assert manifest.function is not None
    return {
        "name": name,
        "revision": manifest.function.revision,
        "snapshot": named.snapshot.digest,
        "port": manifest.function.port,
        "memory_bytes": manifest.machine.memory_bytes,
        "disk_usage_bytes": named.snapshot.disk_usage_bytes(),
        "instances": running.count(name),
    }
