"""Options that every command takes, and the frame in which every command runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from torpor.cli.interrupt import INTERRUPTED, cancelling
from torpor.cli.output import print_error
from torpor.cli.progress import Progress
from torpor.config import Settings, load_settings
from torpor.errors import TorporError
from torpor.host.cancel import in_thread
from torpor.host.space import no_space_of

if TYPE_CHECKING:
    from torpor.node.node import Node
    from torpor.node.service import Service
    from torpor.snapshot.repository.repository import Repository

T = TypeVar("T")

BUG = 70


@dataclass
class Options:
    """The common options as given, before or after the command; after wins."""

    flags: dict[str, str | None] = field(default_factory=dict)
    config: Path | None = None
    as_json: bool = False
    debug: bool = False

    def settings(self) -> Settings:
        """The settings with these flags."""
        return load_settings(self.flags, file=self.config)


options = Options()


def keep(key: str) -> Callable[[str | None], str | None]:
    """A callback that keeps an option's value as that setting's flag."""

    def callback(value: str | None) -> str | None:
        if value is not None:
            options.flags[key] = value
        return value

    return callback


def _keep_flag(key: str) -> Callable[[bool], bool]:
    def keep(value: bool) -> bool:
        if value:
            options.flags[key] = "yes"
        return value

    return keep


def _keep_choice(key: str) -> Callable[[bool | None], bool | None]:
    def keep(value: bool | None) -> bool | None:
        if value is not None:
            options.flags[key] = "yes" if value else "no"
        return value

    return keep


def _keep_config(value: Path | None) -> Path | None:
    options.config = value or options.config
    return value


def _keep_json(value: bool) -> bool:
    options.as_json = options.as_json or value
    return value


def _keep_debug(value: bool) -> bool:
    options.debug = options.debug or value
    return value


Home = Annotated[
    str | None,
    typer.Option("--home", metavar="DIR", callback=keep("home"), help="The node's directory."),
]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", callback=keep("store"), help="The object store."),
]
KeyFile = Annotated[
    str | None,
    typer.Option(
        "--key-file",
        metavar="FILE",
        callback=keep("key_file"),
        help="The domain keys; TORPOR_KEY wins; default: key below home.",
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        callback=_keep_flag("plain"),
        help="Without encryption: whoever reads it reads the function's memory.",
    ),
]
Lazy = Annotated[
    bool | None,
    typer.Option(
        "--lazy/--no-lazy",
        callback=_keep_choice("lazy"),
        help="Wake what is only in the store while it arrives, or fetch it whole first.",
    ),
]
ExpectDigest = Annotated[
    str | None,
    typer.Option(
        "--expect-digest",
        metavar="DIGEST",
        help="Refuse any other snapshot: a name may have been moved, an old one put back.",
    ),
]
Transfer = Annotated[
    str | None,
    typer.Option(
        "--transfer",
        metavar="WAY",
        callback=keep("transfer"),
        help="repository (only what is new, sealed), or whole (for comparison).",
    ),
]
VmmKind = Annotated[
    str | None,
    typer.Option(
        "--vmm",
        metavar="KIND",
        callback=keep("vmm"),
        help="qemu, firecracker, or auto: Firecracker where it and KVM are.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", callback=_keep_config, help="A settings file."),
]
Json = Annotated[bool, typer.Option("--json", callback=_keep_json, help="Print one JSON document.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_keep_debug, help="Log to standard error.")
]


def run_async(work: Callable[[], Awaitable[int | None]]) -> None:
    """Run one command to its end and leave with its exit code.

    Ctrl-C and SIGTERM cancel the work, which cleans up before this exits with 130.
    """
    _set_up_logging()

    async def main() -> int | None:
        task = asyncio.current_task()
        assert task is not None
        with cancelling(task):
            return await work()

    try:
        code = asyncio.run(main()) or 0
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.stderr.write("interrupted; nothing was left behind\n")
        code = INTERRUPTED
    except TorporError as error:
        if options.debug:
            traceback.print_exc()
        print_error(error, as_json=options.as_json)
        code = error.exit_code
    except BrokenPipeError:
        code = 0
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        told = no_space_of(error)
        if isinstance(told, TorporError):
            print_error(told, as_json=options.as_json)
            raise typer.Exit(told.exit_code) from None
        sys.stderr.write(f"internal error: {type(error).__name__}: {error}\n")
        sys.stderr.write("hint: this is a bug in torpor; --debug shows where, please report it\n")
        code = BUG
    raise typer.Exit(code)


@contextlib.asynccontextmanager
async def open_node(*, collect: bool = True) -> AsyncIterator[Node]:
    """The node of these options, with progress on standard error."""
    from torpor.node.node import Node

    with Progress(quiet=options.as_json) as reporter:
        async with Node.open(options.settings(), reporter=reporter, collect=collect) as node:
            yield node


def with_node(
    work: Callable[[Node], Awaitable[T]],
    show: Callable[[T], int | None],
    *,
    collect: bool = True,
) -> None:
    """Run `work` on the node, then `show` its result, whose value is the exit code."""

    async def main() -> int | None:
        async with open_node(collect=collect) as node:
            result = await work(node)
        return show(result)

    run_async(main)


@contextlib.asynccontextmanager
async def open_service() -> AsyncIterator[Service]:
    """The daemon of this home if one answers, else the home itself, as `open_node`.

    Who gives flags of his own, such as --store or --plain, gets a node of his own: a daemon has its
    settings.
    """
    from torpor.api.running import is_running

    settings = options.settings()
    if options.flags.keys() <= {"home"} and await in_thread(is_running, settings.socket_path()):
        from torpor.api.client import AsyncClient

        with Progress(quiet=options.as_json) as reporter:
            async with AsyncClient(settings.socket_path(), reporter=reporter) as client:
                yield client
        return
    from torpor.node.service import LocalService

    async with open_node() as node:
        yield LocalService(node)


def with_service(work: Callable[[Service], Awaitable[T]], show: Callable[[T], int | None]) -> None:
    """Run `work` on the daemon or the node, then `show` its result as `with_node` does."""

    async def main() -> int | None:
        async with open_service() as service:
            result = await work(service)
        return show(result)

    run_async(main)


def with_repository(
    work: Callable[[Repository, Progress], T], show: Callable[[T], int | None]
) -> None:
    """Run blocking `work` on the store's repository, then `show` its result as `with_node` does.

    No node is opened for it: a store can be looked after from any machine with its keys.
    """

    async def main() -> int | None:
        from torpor.node.keyring import looking_keyring
        from torpor.snapshot.repository.repository import Repository
        from torpor.store.stack import open_store

        settings = options.settings()

        def run(progress: Progress) -> T:
            return work(Repository(open_store(settings), looking_keyring(settings)), progress)

        with Progress(quiet=options.as_json) as progress:
            result = await in_thread(run, progress)
        return show(result)

    run_async(main)


def _set_up_logging() -> None:
    level = logging.DEBUG if options.debug else logging.CRITICAL
    form = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=level, format=form)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
