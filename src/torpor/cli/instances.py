"""ps, logs, stop, fork, restore."""

from __future__ import annotations

import json as json_module
import sys
import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from torpor.cli.context import (
    Config,
    Debug,
    ExpectDigest,
    Home,
    Json,
    KeyFile,
    Lazy,
    Plain,
    StoreUrl,
    VmmKind,
    open_node,
    open_service,
    options,
    run_async,
    with_service,
)
from torpor.cli.output import print_json, print_table
from torpor.cli.trace import Plot, TraceOption, check_plot, draw, show_trace
from torpor.host.cancel import in_thread
from torpor.node.trace import trace_of
from torpor.units import format_duration, parse_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.node.live import Instance
    from torpor.node.node import Node
    from torpor.node.service import Service
    from torpor.node.trace import Trace
    from torpor.node.views import ForkedView, InstanceView, LogsView, RestoredView

_A_DAY_S = 86400.0


def list_instances(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the instances of this node; what dead commands left is removed first.

    Example: torpor ps --json
    """

    def show(rows: list[InstanceView]) -> None:
        if options.as_json:
            print_json(msgspec.to_builtins(rows))
            return
        cells = [
            (
                row.id,
                row.function or "-",
                row.state,
                f"{row.address}:{row.port}",
                row.snapshot[:12],
                "-" if row.pid is None else row.pid,
                format_duration((time.time_ns() - row.created_ns) / 1e9),
            )
            for row in rows
        ]
        columns = ("ID", "FUNCTION", "STATE", "ADDRESS", "SNAPSHOT", "PID", "AGE")
        print_table(columns, cells, empty="no instances")

    with_service(lambda service: service.instances(), show)


def logs(
    instance: Annotated[str, typer.Argument(metavar="ID", help="An instance or its beginning.")],
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="The last N lines.")] = 1000,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the instance ends, or Ctrl-C.")
    ] = False,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what an instance's console printed since it was woken.

    Example: torpor logs hello-3f -n 20 --follow
    """

    async def main() -> None:
        async with open_service() as service:
            if follow:
                await _follow(service, instance, lines)
            else:
                _show_logs(await service.logs(instance, lines=lines))

    run_async(main)


def stop(
    instances: Annotated[list[str], typer.Argument(metavar="ID...", help="Instances to end.")],
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """End instances; nothing of them is left on the host.

    Example: torpor stop hello-3f8a0c11
    """

    def show(stopped: list[str]) -> None:
        if options.as_json:
            print_json(stopped)
        else:
            sys.stdout.write("".join(f"{instance}\n" for instance in stopped))

    with_service(lambda service: service.stop(instances), show)


def fork(
    instance: Annotated[str, typer.Argument(metavar="ID", help="An instance or its beginning.")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=64, help="Clones.")] = 1,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make clones of a running instance: same memory and disk, each goes its own way from there.

    The instance stands still for one pause. Each clone has its own address, name and entropy.

    Example: torpor fork ledger-3f8a0c11 --count 2
    """
    with_service(lambda service: service.fork(instance, count=count), _show_forked)


def restore(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A name or a digest.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay until the VM ends or Ctrl-C, then clean up.")
    ] = False,
    trace: TraceOption = False,
    plot: Plot = None,
    expect_digest: ExpectDigest = None,
    lazy: Lazy = None,
    plain: Plain = False,
    key_file: KeyFile = None,
    home: Home = None,
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Wake a snapshot by hand, straight from this node's files or the store.

    Prints the instance, its address, and how long each step took. With --trace: when each began,
    what of its memory and images came from where, and how long the guest stood still for it.

    Example: torpor restore ledger --trace
    """
    traced = trace or plot is not None

    async def main() -> None:
        await in_thread(check_plot, plot)
        expect = parse_digest(expect_digest) if expect_digest else None

        def show(restored: RestoredView) -> None:
            trace = None if restored.trace is None else trace_of(restored.trace)
            _show_restored(restored, trace)
            draw(trace, plot, title=f"restore {reference}")

        from torpor.node.service import view_restored

        if wait:  # the instance is this command's, not a daemon's
            async with open_node() as node:
                instance = await node.restore(reference, kept=True, expect=expect, trace=traced)
                await _wait_for_end(node, instance, lambda: show(view_restored(instance)))
        else:
            async with open_service() as service:
                show(await service.restore(reference, expect=expect, trace=traced))

    run_async(main)


async def _wait_for_end(node: Node, instance: Instance, show: Callable[[], None]) -> None:
    process = instance.vmm.process
    assert process is not None
    try:
        show()
        sys.stdout.flush()
        while not await in_thread(process.wait, timeout_s=_A_DAY_S):
            continue
    finally:
        await node.stop_instance(instance)


async def _follow(service: Service, instance: str, lines: int) -> None:
    async for line in service.follow_logs(instance, lines=lines):
        sys.stdout.write((json_module.dumps(line) if options.as_json else line) + "\n")
        sys.stdout.flush()


def _show_logs(logs: LogsView) -> None:
    if options.as_json:
        print_json(msgspec.to_builtins(logs))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in logs.lines))


def _show_restored(restored: RestoredView, trace: Trace | None) -> None:
    if options.as_json:
        data = msgspec.to_builtins(restored)
        if trace is None:
            del data["trace"]
        print_json(data)
        return
    rows = [("instance", restored.instance), ("address", f"http://{restored.address}/")]
    if trace is None:
        rows += [(step, format_duration(took_s)) for step, took_s in restored.steps_s.items()]
    print_table(("", ""), rows, empty="")
    if trace is not None:
        show_trace(trace)


def _show_forked(forked: ForkedView) -> None:
    if options.as_json:
        print_json(msgspec.to_builtins(forked))
        return
    cells = [(clone.instance, f"http://{clone.address}/") for clone in forked.clones]
    print_table(("ID", "ADDRESS"), cells, empty="")
    sys.stdout.write(f"{forked.instance} stood still for {format_duration(forked.pause_s)}\n")
