"""`torpor`: put together from the command groups."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from torpor import __version__
from torpor.cli import functions, host, instances, keys, measure, serve, snapshots, store, transfers
from torpor.cli.context import Config, Debug, Home, Json, StoreUrl, VmmKind

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"torpor {__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    home: Home = None,
    vmm: VmmKind = None,
    store_url: StoreUrl = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Functions in microVMs that fall asleep as snapshots and wake on any node.

    Exit codes: 0 done, 1 a check failed, 2 to 6 your request, 10 to 24 host or store, 30 to 33
    stored data, 70 a bug, 130 interrupted.
    """


app.command("serve")(serve.serve)
app.command("doctor")(host.doctor)
app.command("deploy")(functions.deploy)
app.command("invoke")(functions.invoke)
app.command("ls")(functions.list_functions)
app.command("rm")(functions.remove)
app.command("ps")(instances.list_instances)
app.command("logs")(instances.logs)
app.command("stop")(instances.stop)
app.command("fork")(instances.fork)
app.command("restore")(instances.restore)
snapshots.app.command("push")(transfers.push)
snapshots.app.command("pull")(transfers.pull)
snapshots.app.command("export")(transfers.export)
snapshots.app.command("import")(transfers.import_archive)
app.add_typer(snapshots.app, name="snapshot")
app.add_typer(store.app, name="store")
app.add_typer(keys.app, name="key")
app.add_typer(host.image, name="image")
app.add_typer(host.net, name="net")
app.add_typer(host.kernel, name="kernel")
app.command("settings")(host.settings)
app.command("bench")(measure.bench)
app.command("demo")(measure.demo)
