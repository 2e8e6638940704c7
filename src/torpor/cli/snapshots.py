"""snapshot create, ls, inspect, verify, rm, gc: the snapshots of this node."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from torpor.cli.context import (
    Config,
    Debug,
    Home,
    Json,
    KeyFile,
    StoreUrl,
    options,
    with_node,
    with_repository,
    with_service,
)
from torpor.cli.output import print_json, print_table
from torpor.host.cancel import in_thread
from torpor.units import format_duration, format_size

if TYPE_CHECKING:
    from torpor.node.catalogue import NamedSnapshot
    from torpor.node.collect import Unneeded
    from torpor.node.node import Node
    from torpor.node.service import Service
    from torpor.node.views import CapturedView, SnapshotView, UnreadableView

app = typer.Typer(no_args_is_help=True, help="Make, list, move and delete snapshots.")

Remote = Annotated[bool, typer.Option("--remote", help="In the store, not on this node.")]
Reference = Annotated[str, typer.Argument(metavar="REF", help="A name, a digest, its beginning.")]


@app.command()
def create(
    instance: Annotated[str, typer.Argument(metavar="ID", help="A running instance.")],
    name: Annotated[str | None, typer.Option(metavar="REF", help="Its name.")] = None,
    trial: Annotated[
        bool, typer.Option("--trial", help="Wake it twice to learn its working set.")
    ] = False,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Snapshot a running instance, which runs on.

    Which windows a wake touches is known of the snapshot that the instance was woken from, and goes
    with this one, so that it wakes from a store as fast. With --trial it is found out anew: the
    snapshot is woken twice, each clone asked for GET /, whatever that answers. The clones are
    thrown away, with what the request changed in them.

    Example: torpor snapshot create ledger-3f8a0c11 --name before-upgrade --trial
    """

    def show(captured: CapturedView) -> None:
        if options.as_json:
            print_json(msgspec.to_builtins(captured))
            return
        rows = [
            ("snapshot", captured.snapshot[:12]),
            ("pause", format_duration(captured.pause_s)),
            ("written since its parent", format_size(captured.written_bytes)),
        ]
        touched = captured.working_set.items()
        found = ", ".join(f"{file} {count} windows" for file, count in touched)
        if found or trial:
            rows.append(("working set", found or "none: FUSE cannot be mounted"))
        print_table(("", ""), rows, empty="")

    with_service(lambda service: service.create_snapshot(instance, name=name, trial=trial), show)


@app.command("ls")
def list_snapshots(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the snapshots on this node, bases too, and what of them cannot be read, with why.

    Example: torpor snapshot ls
    """

    async def work(service: Service) -> tuple[list[SnapshotView], list[UnreadableView]]:
        return await service.snapshots(), await service.unreadable()

    def show(found: tuple[list[SnapshotView], list[UnreadableView]]) -> None:
        snapshots, unreadable = found
        if options.as_json:
            print_json(msgspec.to_builtins([*snapshots, *unreadable]))
            return
        cells = [
            (
                one.snapshot[:12],
                one.kind,
                " ".join(one.names) or "-",
                format_size(one.nonzero_bytes),
                format_size(one.disk_usage_bytes),
            )
            for one in snapshots
        ]
        cells += [
            (
                one.snapshot[:12],
                one.kind,
                " ".join(one.names) or "-",
                "-",
                format_size(one.disk_usage_bytes),
            )
            for one in unreadable
        ]
        print_table(("DIGEST", "KIND", "NAMES", "NON-ZERO", "ON DISK"), cells, empty="no snapshots")
        for one in unreadable:
            sys.stderr.write(f"{one.reason}\n")

    with_service(work, show)


@app.command()
def inspect(
    reference: Reference,
    remote: Remote = False,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a snapshot is made of and what it needs of a host.

    With --remote: what the store has of it, sealed with which key or PLAIN, and how large that is.

    Example: torpor snapshot inspect ledger --json
    """
    if remote:
        from torpor.cli.stored import show_description
        from torpor.snapshot.repository.describing import describe

        with_repository(lambda repository, _: describe(repository, reference), show_description)
        return

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
    remote: Remote = False,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every byte of a snapshot on this node and compare it with its digests.

    With --remote: every byte that a name in the store needs, each chunk opened and verified.

    Example: torpor snapshot verify ledger --remote
    """
    if remote:
        from torpor.cli.stored import show_verified, verify_stored

        with_repository(
            lambda repository, progress: verify_stored(repository, reference, progress),
            show_verified,
        )
        return
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

    def show(digest: str) -> None:
        if options.as_json:
            print_json({"snapshot": digest})
        else:
            sys.stdout.write(f"{digest}\n")

    with_service(lambda service: service.remove_snapshot(reference), show)


@app.command()
def gc(
    bases: Annotated[
        bool, typer.Option("--bases", help="Bases too of which no snapshot here descends.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")
    ] = False,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete snapshots and apps from this node that no name, base or instance needs.

    A base that is deleted is made again by the next deploy on its image.

    Example: torpor snapshot gc --bases --dry-run
    """

    async def work(node: Node) -> list[Unneeded]:
        return await in_thread(node.catalogue.collect, bases=bases, dry_run=dry_run)

    def show(items: list[Unneeded]) -> None:
        if options.as_json:
            print_json({"dry_run": dry_run, "deleted": msgspec.to_builtins(items)})
            return
        rows = [(item.digest[:12], item.kind, format_size(item.size_bytes)) for item in items]
        print_table(("DIGEST", "KIND", "ON DISK"), rows, empty="nothing to delete")
        if items:
            total = format_size(sum(item.size_bytes for item in items))
            sys.stdout.write(f"{total} {'would be ' if dry_run else ''}freed\n")

    with_node(work, show, collect=False)


def _show_named(named: NamedSnapshot) -> None:
    if options.as_json:
        print_json(_summary(named))
    else:
        sys.stdout.write(f"{named.snapshot.digest}\n")


def _summary(named: NamedSnapshot) -> dict[str, Any]:
    from torpor.node.service import view_snapshot

    found: dict[str, Any] = msgspec.to_builtins(view_snapshot(named))
    return found
