"""snapshot create, ls, inspect, verify, rm, push, pull."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from torpor.cli.context import Config, Debug, Home, Json, StoreUrl, options, with_node
from torpor.cli.output import print_json, print_table
from torpor.units import format_duration, format_size

if TYPE_CHECKING:
    from torpor.node.capture import Captured
    from torpor.node.node import NamedSnapshot, Node
    from torpor.snapshot.transfer import TransferReport

app = typer.Typer(no_args_is_help=True, help="Make, list, move and delete snapshots.")

Reference = Annotated[str, typer.Argument(metavar="REF", help="A name, a digest, its beginning.")]


@app.command()
def create(
    instance: Annotated[str, typer.Argument(metavar="ID", help="A running instance.")],
    name: Annotated[str | None, typer.Option(metavar="REF", help="Its name.")] = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Snapshot a running instance, which runs on.

    Example: torpor snapshot create ledger-3f8a0c11 --name before-upgrade
    """

    def show(captured: Captured) -> None:
        data = {
            "snapshot": captured.snapshot.digest,
            "pause_s": captured.pause_s,
            "written_bytes": captured.written_bytes,
            "steps_s": captured.timeline.to_dict(),
        }
        if options.as_json:
            print_json(data)
            return
        rows = [
            ("snapshot", captured.snapshot.digest[:12]),
            ("pause", format_duration(captured.pause_s)),
            ("written since its parent", format_size(captured.written_bytes)),
        ]
        print_table(("", ""), rows, empty="")

    with_node(lambda node: node.create_snapshot(instance, name=name), show)


@app.command("ls")
def list_snapshots(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the snapshots on this node, bases too.

    Example: torpor snapshot ls
    """

    async def work(node: Node) -> list[NamedSnapshot]:
        return node.snapshots()

    def show(snapshots: list[NamedSnapshot]) -> None:
        rows = [_summary(named) for named in snapshots]
        if options.as_json:
            print_json(rows)
            return
        cells = [
            (
                row["snapshot"][:12],
                row["kind"],
                " ".join(row["names"]) or "-",
                format_size(row["nonzero_bytes"]),
                format_size(row["disk_usage_bytes"]),
            )
            for row in rows
        ]
        print_table(("DIGEST", "KIND", "NAMES", "NON-ZERO", "ON DISK"), cells, empty="no snapshots")

    with_node(work, show)


@app.command()
def inspect(
    reference: Reference,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a snapshot is made of and what it needs of a host.

    Example: torpor snapshot inspect ledger --json
    """

    def show(named: NamedSnapshot) -> None:
        manifest = msgspec.to_builtins(named.snapshot.manifest)
        if options.as_json:
            print_json({**_summary(named), "manifest": manifest})
            return
        rows = [(key, value) for key, value in _summary(named).items() if key != "names"]
        rows += [("names", " ".join(named.names) or "-"), ("created_ns", manifest["created_ns"])]
        rows += [(f"platform.{key}", value) for key, value in manifest["platform"].items()]
        rows += [(f"machine.{key}", value) for key, value in manifest["machine"].items()]
        print_table(("", ""), rows, empty="")

    with_node(lambda node: node.inspect(reference), show)


@app.command()
def verify(
    reference: Reference,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every byte of a snapshot on this node and compare it with its digests.

    Example: torpor snapshot verify ledger
    """
    with_node(lambda node: node.verify(reference), _show_named)


@app.command("rm")
def remove(
    reference: Reference,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete a snapshot from this node.

    Example: torpor snapshot rm before-upgrade
    """
    with_node(lambda node: node.remove_snapshot(reference), _show_named)


@app.command()
def push(
    reference: Reference,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Send a snapshot and its images to the store, under its name.

    Example: torpor snapshot push ledger --store s3://functions/prod
    """
    with_node(lambda node: node.push(reference), _show_report)


@app.command()
def pull(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A name or a whole digest.")],
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a snapshot from the store, with the images that this node lacks.

    Example: torpor snapshot pull ledger --home /var/lib/torpor-b
    """

    async def work(node: Node) -> TransferReport:
        _, report = await node.pull(reference)
        return report

    with_node(work, _show_report)


def _show_named(named: NamedSnapshot) -> None:
    if options.as_json:
        print_json(_summary(named))
    else:
        sys.stdout.write(f"{named.snapshot.digest}\n")


def _show_report(report: TransferReport) -> None:
    if options.as_json:
        print_json(
            {
                "snapshot": report.digest,
                "moved_bytes": report.moved_bytes,
                "duration_s": report.duration_s,
                "objects": report.objects,
            }
        )
        return
    rate = format_size(report.moved_bytes / max(report.duration_s, 1e-9))
    rows = [
        ("snapshot", report.digest[:12]),
        ("moved", format_size(report.moved_bytes)),
        ("in", f"{format_duration(report.duration_s)}, {rate}/s"),
    ]
    print_table(("", ""), rows, empty="")


def _summary(named: NamedSnapshot) -> dict[str, Any]:
    manifest = named.snapshot.manifest
    return {
        "snapshot": named.snapshot.digest,
        "kind": manifest.kind,
        "names": list(named.names),
        "function": manifest.function.name if manifest.function else None,
        "parent": manifest.parent,
        "image": manifest.image,
        "memory_bytes": manifest.memory.size_bytes,
        "nonzero_bytes": manifest.memory.data_bytes,
        "vmstate_bytes": manifest.vmstate.size_bytes,
        "disk_data_bytes": manifest.disk.data_bytes,
        "disk_usage_bytes": named.snapshot.disk_usage_bytes(),
    }
