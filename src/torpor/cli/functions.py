"""deploy, invoke, ls, rm."""

from __future__ import annotations

import base64
import os
import selectors
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from torpor.cli.context import (
    Config,
    Debug,
    Home,
    Json,
    StoreUrl,
    VmmKind,
    options,
    with_service,
)
from torpor.cli.output import print_json, print_table
from torpor.cli.trace import TraceOption, show_trace
from torpor.errors import InvalidInput
from torpor.host.cancel import checkpoint, current_token, in_thread
from torpor.node.trace import trace_of
from torpor.units import format_duration, format_size

if TYPE_CHECKING:
    from torpor.node.service import Service
    from torpor.node.views import DeployedView, FunctionView, InvokedView, RemovedView

HTTP_ERROR = 22


def deploy(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where function.toml is.")],
    name: Annotated[str | None, typer.Option(help="Take the place of its name.")] = None,
    home: Home = None,
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Deploy a function: image, base, start, warm-up, snapshot.

    Example: torpor deploy examples/hello --name greeter
    """

    def show(deployed: DeployedView) -> None:
        if options.as_json:
            print_json(msgspec.to_builtins(deployed))
            return
        memory = format_size(deployed.nonzero_bytes)
        rows = [
            ("function", f"{deployed.function}, revision {deployed.revision}"),
            ("snapshot", deployed.snapshot[:12]),
            ("memory", f"{memory} of {format_size(deployed.memory_bytes)}"),
            ("base", "reused" if deployed.base_reused else "made"),
            ("pause", format_duration(deployed.pause_s)),
            *((step, format_duration(s)) for step, s in deployed.steps_s.items()),
        ]
        print_table(("", ""), rows, empty="")

    with_service(lambda service: service.deploy(directory, name=name), show)


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
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Send one request to a function, waking it if it sleeps, and print the body.

    Exit code 22 when the function answers with status 400 or more. --trace goes to standard error.

    Example: torpor invoke ledger -d '{"amount": 5}' -H 'Content-Type: application/json'
    """

    async def work(service: Service) -> InvokedView:
        from torpor.node.invoke import Request

        body = None if data is None else await in_thread(_body, data)
        verb = method or ("GET" if body is None else "POST")
        headers = tuple(_header(text) for text in header or ())
        request = Request(verb, path, headers, body)
        return await service.invoke(function, request, keep=keep, trace=trace)

    def show(invoked: InvokedView) -> int:
        if options.as_json:
            print_json(_invoked(invoked))
        else:
            if include:
                sys.stdout.write(f"{invoked.status} {invoked.reason}\n")
                sys.stdout.write("".join(f"{name}: {value}\n" for name, value in invoked.headers))
                sys.stdout.write("\n")
            sys.stdout.flush()
            sys.stdout.buffer.write(invoked.body)
            if sys.stdout.isatty() and not invoked.body.endswith(b"\n"):
                sys.stdout.write("\n")
            if invoked.trace is not None:
                sys.stdout.flush()
                show_trace(trace_of(invoked.trace), to=sys.stderr)
            elif trace:
                sys.stderr.write("nothing to trace: an instance was running\n")
        if invoked.status >= 400:
            sys.stderr.write(f"the function answered {invoked.status} {invoked.reason}\n")
            return HTTP_ERROR
        return 0

    with_service(work, show)


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

    def show(functions: list[FunctionView]) -> None:
        if options.as_json:
            print_json(msgspec.to_builtins(functions))
            return
        told = any(function.store for function in functions)
        cells = [
            (
                function.name,
                function.revision,
                function.snapshot[:12],
                function.port,
                format_size(function.memory_bytes),
                format_size(function.disk_usage_bytes),
                function.instances,
                *([function.store] if told else []),
            )
            for function in functions
        ]
        columns = ["NAME", "REVISION", "SNAPSHOT", "PORT", "MEMORY", "ON DISK", "INSTANCES"]
        columns += ["STORE"] if told else []
        print_table(columns, cells, empty="no functions; `torpor deploy DIR` makes one")

    with_service(lambda service: service.functions(), show)


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

    async def work(service: Service) -> list[RemovedView]:
        return [await service.remove_function(name) for name in functions]

    def show(removed: list[RemovedView]) -> None:
        if options.as_json:
            print_json(msgspec.to_builtins(removed))
        else:
            sys.stdout.write("".join(f"{one.function}\n" for one in removed))

    with_service(work, show)


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


def _invoked(invoked: InvokedView) -> dict[str, Any]:
    try:
        body = {"body": invoked.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(invoked.body).decode()}
    return {
        "status": invoked.status,
        "headers": [list(pair) for pair in invoked.headers],
        **body,
        "instance": invoked.instance,
        "woken": invoked.woken,
        "steps_s": invoked.steps_s,
        **({} if invoked.trace is None else {"trace": invoked.trace}),
    }
