"""What concerns the host: image, net, kernel, settings, doctor."""

from __future__ import annotations

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
    run_async,
    with_node,
)
from torpor.cli.output import print_json, print_table
from torpor.cli.progress import Progress
from torpor.errors import InvalidInput, NotFound
from torpor.host.cancel import in_thread
from torpor.units import format_size

if TYPE_CHECKING:
    from torpor.image.library import ImageInfo
    from torpor.net.check import FieldCheck
    from torpor.net.registry import SlotRecord
    from torpor.node.node import Node

image = typer.Typer(no_args_is_help=True, help="Build, list and delete images.")
net = typer.Typer(no_args_is_help=True, help="List and check network slots.")
kernel = typer.Typer(no_args_is_help=True, help="The guests' kernel.")


@image.command("build")
def build_image(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where function.toml is.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build it even if it is here.")
    ] = False,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Build the image that DIR/function.toml names.

    Example: torpor image build examples/thumbs
    """
    with_node(
        lambda node: node.build_image(directory, rebuild=rebuild), lambda info: _show_images([info])
    )


@image.command("ls")
def list_images(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List images and apps on this node.

    Example: torpor image ls --json
    """

    async def work(node: Node) -> list[ImageInfo]:
        return await in_thread(node.parts.images.list)

    with_node(work, _show_images)


@image.command("rm")
def remove_image(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="A digest or its beginning.")],
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete an image that no snapshot on this node needs.

    Example: torpor image rm aaa654163d2b
    """
    with_node(lambda node: node.remove_image(digest), lambda info: _show_images([info]))


def _show_images(images: list[ImageInfo]) -> None:
    if options.as_json:
        print_json([msgspec.to_builtins(info) for info in images])
        return
    rows = [(i.digest[:12], i.kind, format_size(i.size_bytes), i.made_of) for i in images]
    print_table(("DIGEST", "KIND", "SIZE", "MADE OF"), rows, empty="no images")


@net.command("ls")
def list_slots(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the network slots of this host, those of all homes.

    Example: torpor net ls
    """

    async def work(node: Node) -> list[SlotRecord]:
        return await in_thread(node.parts.slots.list)

    def show(records: list[SlotRecord]) -> None:
        if options.as_json:
            print_json([msgspec.to_builtins(record) for record in records])
            return
        rows = [(r.slot, r.state, r.instance or "-", r.home or "-") for r in records]
        print_table(("SLOT", "STATE", "INSTANCE", "HOME"), rows, empty="no network slots")

    with_node(work, show)


@net.command("check")
def check(
    instance: Annotated[
        str | None, typer.Argument(metavar="ID", help="An instance or its beginning.")
    ] = None,
    log_line: Annotated[
        str | None, typer.Option("--log-line", metavar="LINE", help="An allocation's log line.")
    ] = None,
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare every field of a network allocation with the live host; exit 1 on a difference.

    Example: torpor net check hello-3f8a0c11

    Example: torpor net check --log-line 'CloneIP=172.18.0.1 ContainerCIDR=172.16.0.2/24 …'
    """

    async def work(node: Node) -> list[FieldCheck]:
        return await in_thread(_check, node, instance, log_line)

    def show(checks: list[FieldCheck]) -> int:
        if options.as_json:
            print_json(
                [
                    {"field": c.name, "expected": c.expected, "actual": c.actual, "ok": c.ok}
                    for c in checks
                ]
            )
        else:
            rows = [(c.name, c.expected, c.actual, "ok" if c.ok else "DIFFERENT") for c in checks]
            print_table(("FIELD", "EXPECTED", "ON THE HOST", ""), rows, empty="")
        return 0 if all(c.ok for c in checks) else 1

    with_node(work, show)


def _check(node: Node, instance: str | None, log_line: str | None) -> list[FieldCheck]:
    from torpor.net.check import check_allocation
    from torpor.net.log_line import allocation_fields, parse_log_line

    if (instance is None) == (log_line is None):
        raise InvalidInput("name either an instance or a --log-line")
    if log_line is not None:
        return check_allocation(parse_log_line(log_line), node.parts.slots)
    row = node.parts.journal.instance(instance or "")
    if row.slot is None:
        raise NotFound(f"instance {row.id} has no network slot yet")
    addresses = node.parts.slots.get(row.slot).addresses
    return check_allocation(allocation_fields(addresses, row.id), node.parts.slots)


@kernel.command("install")
def install(
    home: Home = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Install Debian's cloud kernel and torpor's initramfs for the guests of this host.

    Example: torpor kernel install
    """

    async def main() -> None:
        from torpor.image.kernel import install_kernel

        with Progress(quiet=options.as_json) as progress:
            boot = await in_thread(
                install_kernel, options.settings().boot_dir, progress=progress.say
            )
        data = {
            "version": boot.version,
            "kernel": str(boot.kernel),
            "kernel_digest": boot.kernel_digest,
            "initramfs": str(boot.initramfs),
            "initramfs_digest": boot.initramfs_digest,
        }
        if options.as_json:
            print_json(data)
        else:
            print_table(("", ""), list(data.items()), empty="")

    run_async(main)


def settings(
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print every setting, its environment variable and its value.

    Example: torpor settings --home /tmp/a
    """

    async def main() -> None:
        from torpor.config import describe_settings

        rows = describe_settings(options.settings())
        if options.as_json:
            print_json(rows)
        else:
            shown = [(r["key"], r["environment"], r["value"], r["help"]) for r in rows]
            print_table(("KEY", "ENVIRONMENT", "VALUE", ""), shown, empty="")

    run_async(main)


def doctor(
    home: Home = None,
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check whether this host can run torpor; exit 1 if something is missing.

    Example: torpor doctor
    """

    async def main() -> int:
        from torpor.node.doctor import examine

        findings = await in_thread(examine, options.settings())
        if options.as_json:
            rows: list[dict[str, Any]] = [finding.to_dict() for finding in findings]
            print_json(rows)
        else:
            for finding in findings:
                sys.stdout.write(f"{finding.status:8} {finding.name}: {finding.found}\n")
                if finding.advice:
                    sys.stdout.write(f"         {finding.advice}\n")
        return 1 if any(finding.status == "failure" for finding in findings) else 0

    run_async(main)
