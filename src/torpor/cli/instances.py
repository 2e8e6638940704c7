"""ps, logs, stop, restore."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

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
    open_node,
    options,
    run_async,
    with_node,
)
from torpor.cli.output import print_json, print_table
from torpor.cli.trace import Plot, TraceOption, check_plot, draw, show_trace
from torpor.host.cancel import in_thread
from torpor.units import format_duration, parse_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.node.instance import Instance
    from torpor.node.journal_rows import InstanceRow
    from torpor.node.node import Node

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

    async def work(node: Node) -> list[InstanceRow]:
        return await in_thread(node.parts.journal.instances)

    def show(rows: list[InstanceRow]) -> None:
        if options.as_json:
            print_json([_row(row) for row in rows])
            return
        cells = [
            (
                row.id,
                row.function or "-",
                row.state,
                f"{row.address}:{row.port}",
                row.snapshot[:12],
                row.vmm.pid if row.vmm else "-",
                format_duration((time.time_ns() - row.created_ns) / 1e9),
            )
            for row in rows
        ]
        columns = ("ID", "FUNCTION", "STATE", "ADDRESS", "SNAPSHOT", "PID", "AGE")
        print_table(columns, cells, empty="no instances")

    with_node(work, show)


def logs(
    instance: Annotated[str, typer.Argument(metavar="ID", help="An instance or its beginning.")],
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="The last N lines.")] = 1000,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what an instance's console printed since it was woken.

    Example: torpor logs hello-3f -n 20
    """

    async def work(node: Node) -> str:
        return await in_thread(node.console, instance, lines=lines)

    def show(text: str) -> None:
        if options.as_json:
            print_json({"instance": instance, "lines": text.splitlines()})
        elif text:
            sys.stdout.write(text + "\n")

    with_node(work, show)


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

    async def work(node: Node) -> list[str]:
        return await node.stop_all(instances)

    def show(stopped: list[str]) -> None:
        if options.as_json:
            print_json(stopped)
        else:
            sys.stdout.write("".join(f"{instance}\n" for instance in stopped))

    with_node(work, show)


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
        async with open_node() as node:
            expect = parse_digest(expect_digest) if expect_digest else None
            instance = await node.restore(reference, kept=wait, expect=expect, trace=traced)

            def show() -> None:
                _show_restored(instance)
                draw(instance.trace, plot, title=f"restore {reference}")

            if wait:
                await _wait_for_end(node, instance, show)
            else:
                show()

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


def _show_restored(instance: Instance) -> None:
    assert instance.function is not None
    address = f"{instance.address}:{instance.function.port}"
    steps, trace = instance.timeline.to_dict(), instance.trace
    if options.as_json:
        data = {"instance": instance.id, "address": address, "steps_s": steps}
        print_json(data if trace is None else {**data, "trace": trace.to_dict()})
        return
    rows = [("instance", instance.id), ("address", f"http://{address}/")]
    if trace is None:
        rows += [(step, format_duration(duration_s)) for step, duration_s in steps.items()]
    print_table(("", ""), rows, empty="")
    if trace is not None:
        show_trace(trace)


def _row(row: InstanceRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "function": row.function,
        "state": row.state,
        "address": row.address,
        "port": row.port,
        "slot": row.slot,
        "snapshot": row.snapshot,
        "pid": row.vmm.pid if row.vmm else None,
        "created_ns": row.created_ns,
    }
