"""key init, show, rotate: the domain keys of this node, which seal what it pushes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torpor.cli.context import Config, Debug, Home, Json, KeyFile, options, run_async
from torpor.cli.output import print_json, print_table
from torpor.config import Settings
from torpor.host.cancel import in_thread

if TYPE_CHECKING:
    from torpor.node.keyring import KnownKeys

app = typer.Typer(no_args_is_help=True, help="Make, show and rotate the keys that seal snapshots.")


@app.command()
def init(
    key_file: KeyFile = None,
    home: Home = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a key, in a file that only its owner can read.

    Nodes that share a store need the same key: copy the file, or set TORPOR_KEY to what
    `torpor key show --reveal` prints. Without its key a sealed snapshot is lost.

    Example: torpor key init --key-file /etc/torpor/key
    """
    from torpor.node.keyring import init_key

    _run(
        init_key,
        "made a key; keep a copy of the file where the store is not:"
        " what is sealed with it cannot be read without it",
    )


@app.command()
def show(
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Print the keys themselves; they are secret.")
    ] = False,
    key_file: KeyFile = None,
    home: Home = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the ids of the keys that are used here, and where they come from.

    Example: torpor key show
    """
    from torpor.node.keyring import known_keys

    _run(known_keys, "", reveal=reveal)


@app.command()
def rotate(
    key_file: KeyFile = None,
    home: Home = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a new key for what is pushed from now on; the older keys stay, to read.

    Example: torpor key rotate
    """
    from torpor.node.keyring import rotate_key

    _run(
        rotate_key,
        "old snapshots stay readable with the older keys in the file; what is pushed from now on"
        " is sealed with the new one and shares no chunk with what was pushed before",
    )


def _run(work: Callable[[Settings], KnownKeys], notice: str, *, reveal: bool = False) -> None:
    async def main() -> None:
        known = await in_thread(work, options.settings())
        rows = _rows(known, reveal=reveal)
        if options.as_json:
            print_json({"source": known.source, "keys": rows, "notice": notice})
        else:
            cells = [tuple(row.values()) for row in rows]
            print_table(("KEY", "USED TO", *(("SECRET",) if reveal else ())), cells, empty="")
            sys.stdout.write(f"from {known.source}\n")
        if known.file_unused is not None:
            sys.stderr.write(f"note: {known.file_unused} is there too and is not used\n")
        if notice and not options.as_json:
            sys.stderr.write(f"{notice}\n")

    run_async(main)


def _rows(known: KnownKeys, *, reveal: bool) -> list[dict[str, Any]]:
    return [
        {
            "id": key.domain.key_id.hex(),
            "use": "write and read" if index == 0 else "read",
            **({"key": key.line} if reveal else {}),
        }
        for index, key in enumerate(known.keys)
    ]
