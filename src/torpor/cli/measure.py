"""bench and demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from torpor.cli.context import Config, Debug, Home, Json, StoreUrl, open_node, options, run_async
from torpor.cli.output import print_json, print_table
from torpor.cli.progress import Progress
from torpor.errors import InvalidInput
from torpor.units import format_duration, format_size


def bench(
    scenario: Annotated[str, typer.Argument(metavar="NAME", help="restore or pause.")],
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Rounds.")] = 7,
    function: Annotated[
        Path, typer.Option(metavar="DIR", help="The function to measure with.")
    ] = Path("examples/hello"),
    home: Home = None,
    store: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure: series of samples, interleaved, and ratios with median, p10 and p90.

    Example: torpor bench restore --runs 9 --json
    """

    async def main() -> None:
        from torpor.bench.pause import bench_pause
        from torpor.bench.restore import bench_restore

        scenarios = {"restore": bench_restore, "pause": bench_pause}
        if scenario not in scenarios:
            raise InvalidInput(
                f"there is no benchmark {scenario!r}", hint=f"there are: {', '.join(scenarios)}"
            )
        async with open_node() as node:
            report = await scenarios[scenario](node, function=function, runs=runs)
        if options.as_json:
            print_json(report.to_dict())
            return
        from torpor.bench.report import Spread

        rows = []
        for name, series in report.series.items():
            spread = Spread.of(series.samples)
            rows.append((name, *(f"{v:.4g} {series.unit}" for v in dataclasses.astuple(spread))))
        for name, spread in report.ratios.items():
            rows.append((name, *(f"{v:.3f}" for v in dataclasses.astuple(spread))))
        print_table(("", "MEDIAN", "P10", "P90"), rows, empty="")

    run_async(main)


def demo(
    function: Annotated[Path, typer.Option(metavar="DIR", help="The ledger.")] = Path(
        "examples/ledger"
    ),
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="Where both nodes and the store are made.")
    ] = Path("/var/cache/torpor/demo"),
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
