"""store ls, stat, check, gc, rm: what is in the store, whoever pushed it."""

from __future__ import annotations

import sys
import time
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
    with_repository,
)
from torpor.cli.output import print_json, print_table
from torpor.cli.progress import Progress
from torpor.units import format_duration, format_size, parse_duration

if TYPE_CHECKING:
    from torpor.snapshot.repository.check import Checked
    from torpor.snapshot.repository.describing import RefLine
    from torpor.snapshot.repository.gc import Collected
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.repository.stat import StoreStat

app = typer.Typer(no_args_is_help=True, help="Look at the store, check it, clean it up.")


@app.command("ls")
def list_refs(
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the names in the store, what they point to, and which key each is sealed with.

    Example: torpor store ls --store s3://functions/prod
    """
    from torpor.snapshot.repository.describing import list_refs

    def show(lines: list[RefLine]) -> None:
        if options.as_json:
            print_json([_ref(line) for line in lines])
            return
        rows = [
            (
                line.name,
                line.snapshot[:12] or "-",
                line.problem or line.key_id or "PLAIN",
                _age(line.updated_ns) if line.updated_ns else "-",
            )
            for line in lines
        ]
        print_table(("NAME", "SNAPSHOT", "SEALED WITH", "AGE"), rows, empty="no names in the store")

    with_repository(lambda repository, _: list_refs(repository), show)


@app.command()
def stat(
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how much the store holds, what sharing and compression save, and who needs what.

    Example: torpor store stat
    """
    from torpor.snapshot.repository.stat import measure

    with_repository(lambda repository, _: measure(repository), _show_stat)


@app.command()
def check(
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read, open and verify every chunk too.")
    ] = False,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that all that names in the store need is there and right; exit 1 if not.

    Example: torpor store check --read-data
    """
    from torpor.snapshot.repository.check import check

    with_repository(
        lambda repository, progress: check(repository, progress=progress, read_data=read_data),
        _show_checked,
    )


@app.command()
def gc(
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="How long what nothing needs is kept.")
    ] = "7d",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")
    ] = False,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete what no name in the store needs; pushes may go on meanwhile.

    What is found for the first time is marked, and deleted by a run after the grace period.

    Example: torpor store gc --grace 1d --dry-run
    """
    from torpor.snapshot.repository.gc import collect

    def work(repository: Repository, progress: Progress) -> Collected:
        grace_s = parse_duration(grace)
        return collect(repository, grace_s=grace_s, dry_run=dry_run, progress=progress)

    with_repository(work, _show_collected)


@app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names in the store.")],
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete names from the store; what only they needed is left to `store gc`.

    Example: torpor store rm ledger
    """

    def work(repository: Repository, _: Progress) -> list[str]:
        for name in names:
            repository.delete_ref(name)
        return names

    def show(removed: list[str]) -> None:
        if options.as_json:
            print_json(removed)
        else:
            sys.stdout.write("".join(f"{name}\n" for name in removed))

    with_repository(work, show)


def _show_checked(checked: Checked) -> int:
    """Print what a check found; the exit code."""
    if options.as_json:
        print_json(msgspec.to_builtins(checked))
    else:
        rows = [(problem.key, problem.reason) for problem in checked.problems]
        if rows:
            print_table(("OBJECT", "PROBLEM"), rows, empty="")
        counts = (
            f"{checked.refs} names, {checked.snapshots} snapshots, {checked.images} images,"
            f" {checked.packs} packs, {checked.chunks} chunks"
        )
        read = f", {format_size(checked.read_bytes)} read" if checked.read_bytes else ""
        sys.stdout.write(f"{counts}{read}: {len(rows) or 'no'} problems\n")
    return 1 if checked.problems else 0


def _show_stat(found: StoreStat) -> None:
    if options.as_json:
        print_json(msgspec.to_builtins(found))
        return
    totals = [
        ("logical", format_size(found.logical_bytes), "content that the names need, added up"),
        ("unique", format_size(found.unique_bytes), "each content once"),
        ("compressed", format_size(found.compressed_bytes), "that, as it is stored"),
        ("unneeded", format_size(found.unneeded_bytes), "in packs beside it"),
    ]
    totals += [
        (kind, format_size(size), "objects in the store") for kind, size in found.objects.items()
    ]
    print_table(("", "BYTES", ""), totals, empty="")
    rows = [
        (
            ref.name,
            ref.function or "-",
            ref.snapshot[:12],
            format_size(ref.logical_bytes),
            format_size(ref.stored_bytes),
            format_size(ref.own_bytes),
            format_size(ref.shared_bytes),
            "PLAIN" if ref.is_plain else "sealed",
        )
        for ref in found.refs
    ]
    columns = ("NAME", "FUNCTION", "SNAPSHOT", "LOGICAL", "STORED", "OWN", "SHARED", "")
    sys.stdout.write("\n")
    print_table(columns, rows, empty="no names in the store")


def _show_collected(found: Collected) -> None:
    if options.as_json:
        print_json(msgspec.to_builtins(found))
        return
    deleted = "would be deleted" if found.dry_run else "deleted"
    waiting = f"waiting, for the grace period or for {found.pushes} pushes under way"
    rows = [
        (deleted, found.deleted, format_size(found.deleted_bytes)),
        (waiting, found.condemned, format_size(found.condemned_bytes)),
        ("kept", found.kept, format_size(found.kept_bytes)),
    ]
    print_table(("", "OBJECTS", "BYTES"), rows, empty="")


def _ref(line: RefLine) -> dict[str, Any]:
    return {
        "name": line.name,
        "snapshot": line.snapshot or None,
        "key": line.key_id or None,
        "plain": not line.problem and not line.key_id,
        "updated_ns": line.updated_ns or None,
        "problem": line.problem or None,
    }


def _age(updated_ns: int) -> str:
    return format_duration(max(0.0, (time.time_ns() - updated_ns) / 1e9))
