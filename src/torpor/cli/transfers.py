"""snapshot push, pull, export, import: what moves between nodes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torpor.cli.context import (
    Config,
    Debug,
    ExpectDigest,
    Home,
    Json,
    KeyFile,
    Plain,
    StoreUrl,
    Transfer,
    options,
    with_node,
)
from torpor.cli.output import print_json, print_table
from torpor.units import format_duration, format_size, parse_digest

if TYPE_CHECKING:
    from torpor.node.exchange import Exported, Imported
    from torpor.node.node import Node
    from torpor.snapshot.transfer import TransferReport

Reference = Annotated[str, typer.Argument(metavar="REF", help="A name, a digest, its beginning.")]


def push(
    reference: Reference,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name in the store; default: its own.")
    ] = None,
    plain: Plain = False,
    transfer: Transfer = None,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Send what the store lacks of a snapshot and its images, then point a name to it.

    It is sealed with the first of this node's keys. Cut off, it repeats only what had not arrived.

    Example: torpor snapshot push ledger --store s3://functions/prod
    """

    async def work(node: Node) -> tuple[TransferReport, str]:
        report = await node.push(reference, name=name)
        return report, node.exchange.sealed_with()

    def show(result: tuple[TransferReport, str]) -> None:
        report, key_id = result
        _show_report(report, key_id, extra={})

    with_node(work, show)


def pull(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A name or a whole digest.")],
    expect_digest: ExpectDigest = None,
    plain: Plain = False,
    transfer: Transfer = None,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a snapshot from the store, with the images that this node lacks.

    Everything is verified before it appears here; of a pull that fails nothing is left.

    Example: torpor snapshot pull ledger --home /var/lib/torpor-b
    """

    async def work(node: Node) -> TransferReport:
        expect = parse_digest(expect_digest) if expect_digest else None
        _, report = await node.pull(reference, expect=expect)
        return report

    with_node(work, lambda report: _show_report(report, None, extra={}))


def export(
    reference: Reference,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive; - is standard output.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name in the archive; default: its own.")
    ] = None,
    plain: Plain = False,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a snapshot with its images to one file, for a node without the store.

    The file takes the place of an older one only when it is whole. It is sealed: whoever imports
    it needs the same key.

    Example: torpor snapshot export ledger ledger.tar
    """

    def show(exported: Exported) -> None:
        data = {
            "snapshot": exported.digest,
            "name": exported.name,
            "size_bytes": exported.size_bytes,
            "key": exported.key_id or None,
        }
        stream = sys.stderr if str(file) == "-" else sys.stdout
        if options.as_json:
            print_json(data, to=stream)
            return
        stream.write(f"{exported.digest}\n")
        sys.stderr.write(f"{format_size(exported.size_bytes)}, {_sealed(exported.key_id)}\n")
        if exported.key_id:
            sys.stderr.write(
                f"whoever imports it needs key {exported.key_id}:"
                " `torpor key show --reveal` prints it\n"
            )

    with_node(lambda node: node.export(reference, file, name=name), show)


def import_archive(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An archive; - is standard input.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name here; default: the archive's.")
    ] = None,
    expect_digest: ExpectDigest = None,
    plain: Plain = False,
    key_file: KeyFile = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Take over the snapshot in an archive that `snapshot export` wrote.

    Everything is verified before it appears here; of an archive that is refused nothing is left.

    Example: torpor snapshot import ledger.tar
    """

    async def work(node: Node) -> Imported:
        expect = parse_digest(expect_digest) if expect_digest else None
        return await node.import_archive(file, name=name, expect=expect)

    with_node(
        work, lambda imported: _show_report(imported.report, None, extra={"name": imported.name})
    )


def _show_report(report: TransferReport, key_id: str | None, *, extra: dict[str, str]) -> None:
    sealed = {} if key_id is None else {"key": key_id or None}
    if options.as_json:
        print_json(
            {
                "snapshot": report.digest,
                **extra,
                "moved_bytes": report.moved_bytes,
                "raw_bytes": report.raw_bytes,
                "unread_bytes": report.unread_bytes,
                "duration_s": report.duration_s,
                **sealed,
                "objects": report.objects,
            }
        )
        return
    rate = format_size(report.moved_bytes / max(report.duration_s, 1e-9))
    rows = [
        ("snapshot", report.digest),
        *extra.items(),
        ("moved", format_size(report.moved_bytes)),
        ("in", f"{format_duration(report.duration_s)}, {rate}/s"),
    ]
    if key_id is not None:
        rows.append(("sealed", _sealed(key_id)))
    print_table(("", ""), rows, empty="")


def _sealed(key_id: str) -> str:
    return f"sealed with key {key_id}" if key_id else "PLAIN: whoever reads it reads the memory"
