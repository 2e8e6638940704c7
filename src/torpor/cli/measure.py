"""bench and demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torpor.cli.context import (
    Config,
    Debug,
    Home,
    Json,
    StoreUrl,
    VmmKind,
    open_node,
    options,
    run_async,
)
from torpor.cli.output import print_json, print_table
from torpor.cli.progress import Progress
from torpor.errors import InvalidInput
from torpor.units import format_duration, format_size, parse_size

if TYPE_CHECKING:
    from torpor.bench.report import Report


def bench(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="restore, pause, clones, push, pull, paging, crowd, gateway, burst or cycles.",
        ),
    ],
    rounds: Annotated[
        int | None,
        typer.Option("--runs", min=1, max=1000, help="Rounds: 7, of cycles 300 if not given."),
    ] = None,
    function: Annotated[
        Path, typer.Option(metavar="DIR", help="The function to measure with.")
    ] = Path("examples/hello"),
    minio: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The MinIO program, if not the set-up's."),
    ] = None,
    no_vm: Annotated[
        bool,
        typer.Option("--no-vm", help="push, pull: made-up functions instead of deployed ones."),
    ] = False,
    memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="push, pull: guest memory to look at peak memory with."),
    ] = "4GiB",
    local: Annotated[bool, typer.Option("--local", help="restore: no wakes from a store.")] = False,
    no_boot: Annotated[bool, typer.Option("--no-boot", help="restore: boot nothing.")] = False,
    stub: Annotated[
        bool, typer.Option("--stub", help="gateway: a function on loopback instead of in a VM.")
    ] = False,
    home: Home = None,
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure: series of samples, interleaved, and ratios with median, p10 and p90.

    All but pause, gateway and burst start a MinIO and a link in namespaces of their own. As root.

    Example: torpor bench restore --runs 9 --json

    Example: torpor bench push --runs 3 --no-vm
    """

    async def main() -> None:
        from torpor.bench.arena import Sizes
        from torpor.bench.burst import bench_burst
        from torpor.bench.clones import bench_clones
        from torpor.bench.crowd import bench_crowd
        from torpor.bench.cycles import bench_cycles
        from torpor.bench.gateway import bench_gateway
        from torpor.bench.minio import find_minio
        from torpor.bench.paging import bench_paging
        from torpor.bench.pause import bench_pause
        from torpor.bench.pull import bench_pull
        from torpor.bench.push import bench_push
        from torpor.bench.restore import bench_restore

        runs = rounds or (300 if scenario == "cycles" else 7)
        async with open_node() as node:
            match scenario:
                case "restore":
                    report = await bench_restore(
                        node,
                        function=function,
                        runs=runs,
                        minio=None if local else find_minio(minio),
                        cold=not no_boot,
                    )
                case "pause":
                    report = await bench_pause(node, function=function, runs=runs)
                case "clones":
                    report = await bench_clones(node, function=function, runs=runs)
                case "paging":
                    report = await bench_paging(node, runs=runs, minio=find_minio(minio))
                case "crowd":
                    report = await bench_crowd(
                        node, function=function, runs=runs, minio=find_minio(minio)
                    )
                case "gateway":
                    report = await bench_gateway(node, function=function, runs=runs, vm=not stub)
                case "burst":
                    report = await bench_burst(node, function=function, runs=runs)
                case "cycles":
                    report = await bench_cycles(node, function=function, runs=runs)
                case "push" | "pull":
                    measure = bench_push if scenario == "push" else bench_pull
                    report = await measure(
                        node,
                        function=function,
                        runs=runs,
                        minio=find_minio(minio),
                        vms=not no_vm,
                        sizes=dataclasses.replace(Sizes(), peak_bytes=parse_size(memory)),
                    )
                case other:
                    raise InvalidInput(
                        f"there is no benchmark {other!r}",
                        hint="choose restore, pause, clones, push, pull, paging, crowd, gateway,"
                        " burst or cycles",
                    )
        _print_report(report)

    run_async(main)


def _print_report(report: Report) -> None:
    if options.as_json:
        print_json(report.to_dict())
        return
    from torpor.bench.report import Spread

    def promised(name: str) -> str:
        bound = report.promises.get(name)
        return str(bound) if bound else ""

    rows = []
    for name, series in report.series.items():
        spread = Spread.of(series.samples)
        values = (f"{v:.4g} {series.unit}" for v in dataclasses.astuple(spread))
        rows.append((name, *values, promised(name)))
    for name, spread in report.ratios.items():
        values = (f"{v:.3f}" for v in dataclasses.astuple(spread))
        rows.append((name, *values, promised(name)))
    print_table(("", "MEDIAN", "P10", "P90", "PROMISED"), rows, empty="")


def demo(
    function: Annotated[Path, typer.Option(metavar="DIR", help="The ledger.")] = Path(
        "examples/ledger"
    ),
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="Where both nodes and the store are made.")
    ] = Path("/var/cache/torpor/demo"),
    vmm: VmmKind = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the main job on two nodes: deploy, snapshot, push, wake elsewhere, prove it.

    Example: torpor demo
    """

    async def main() -> int:
        from torpor.bench.demo import demonstrate

        with Progress(quiet=options.as_json) as reporter:
            shown = await demonstrate(
                options.settings(), function=function, directory=directory, reporter=reporter
            )
        if options.as_json:
            print_json({"figures": shown.figures, "proofs": shown.proofs})
            return 0 if shown.succeeded else 1
        print_table(("MEASURED", ""), [_figure(*pair) for pair in shown.figures.items()], empty="")
        rows = [
            ("yes" if held else "NO", claim, shown.details[claim])
            for claim, held in shown.proofs.items()
        ]
        print_table(("PROVED", "", ""), rows, empty="")
        return 0 if shown.succeeded else 1

    run_async(main)


def _figure(name: str, value: float) -> tuple[str, str]:
    label, _, unit = name.rpartition("_")
    if unit == "s":
        return label, format_duration(value)
    if unit == "bytes":
        return label, format_size(value)
    return name, f"{value:.1f}"
