"""What a node is put together from: paths below its home and the rooms it uses."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from torpor.errors import HostUnfit
from torpor.host.lock import exclusive, shared
from torpor.image.kernel import BootFiles, load_boot
from torpor.image.library import ImageLibrary
from torpor.net.registry import SlotRegistry
from torpor.node.events import Events
from torpor.node.journal import Journal
from torpor.snapshot.local import LocalSnapshots
from torpor.store.metrics import Counters
from torpor.vmm.firecracker.driver import FirecrackerDriver
from torpor.vmm.firecracker.program import is_usable
from torpor.vmm.qemu.driver import QemuDriver

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from pathlib import Path

    from torpor.config import Settings
    from torpor.snapshot.manifest import Manifest
    from torpor.vmm.interface import Driver

log = logging.getLogger("torpor.node")

_LOCK_WAIT_S: Final = 10.0
_DRIVERS: Final[dict[str, Callable[[Settings], Driver]]] = {
    "qemu": QemuDriver,
    "firecracker": FirecrackerDriver,
}


class Reporter(Protocol):
    """Who is told how a long operation gets on. Called from any thread."""

    def say(self, text: str) -> None:
        """A new phase began: `building the image`."""

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """So much of a transfer is done; `total_bytes` is None while it is not known."""


class Silent:
    """A Reporter that tells nobody."""

    def say(self, text: str) -> None:
        """See Reporter."""

    def step(self, what: str, done_bytes: int, total_bytes: int | None) -> None:
        """See Reporter."""


@dataclass
class Silence:
    """Until when, on CLOCK_MONOTONIC, a store is not asked again that did not answer soon."""

    until: float = 0.0


@dataclass(frozen=True)
class Parts:
    """One node's parts; made once by `open_parts`, shared by all that the node does.

    `driver` makes the VMs that boot; what is made from a snapshot asks `driver_of`.
    """

    settings: Settings
    journal: Journal
    snapshots: LocalSnapshots
    images: ImageLibrary
    slots: SlotRegistry
    driver: Driver
    reporter: Reporter
    events: Events = field(default_factory=Events)
    store_counters: Counters = field(default_factory=Counters)
    silence: Silence = field(default_factory=Silence)
    making: set[str] = field(default_factory=set)
    """Instances that this process is just making: others of its tasks wait before they end one."""

    ending: set[str] = field(default_factory=set)
    """Instances that a task of this process removes; the journal excludes other processes only."""

    @property
    def instances_dir(self) -> Path:
        """Each instance's own directory is below it, named by its id."""
        return self.settings.home / "instances"

    @property
    def locks_dir(self) -> Path:
        """Lock files of operations that exclude each other."""
        return self.settings.home / "locks"

    def files_lock(
        self, *, alone: bool = False, wait_s: float = _LOCK_WAIT_S
    ) -> contextlib.AbstractContextManager[None]:
        """Held shared by all that uses snapshots and images, alone by what deletes them.

        Blocking; may be held shared several times. Raises Conflict after `wait_s`.
        """
        take = exclusive if alone else shared
        path = self.locks_dir / "files"
        return take(path, timeout_s=wait_s, what="this home's snapshots")

    def driver_of(self, manifest: Manifest) -> Driver:
        """Who restores a snapshot, and has the instances that were restored from it.

        The VMM that made it if the setting leaves that open, else the one that is set: it then
        refuses the other's snapshots. Raises HostUnfit when the VMM is missing.
        """
        wanted, driver = manifest.platform.vmm, self.driver
        if self.settings.vmm == "auto" and wanted != driver.name and wanted in _DRIVERS:
            driver = _DRIVERS[wanted](self.settings)
        return driver.like(manifest.platform)

    def boot_files(self) -> BootFiles:
        """Kernel and initramfs of this host. Blocking; raises HostUnfit."""
        return load_boot(self.settings.boot_dir)


def choose_driver(settings: Settings) -> Driver:
    """The driver for VMs that boot. Blocking. Raises HostUnfit."""
    if settings.vmm == "auto":
        return _DRIVERS["firecracker" if is_usable(settings) else "qemu"](settings)
    return _DRIVERS[settings.vmm](settings)


def open_parts(
    settings: Settings, *, reporter: Reporter | None = None, driver: Driver | None = None
) -> Parts:
    """Open a home, creating it if it is new. Blocking. Raises HostUnfit when it cannot."""
    home = settings.home
    try:
        for directory in (home, home / "instances", home / "locks"):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise HostUnfit(
            f"cannot use {home} as home", reason=str(error), hint="name another with --home"
        ) from None
    return Parts(
        settings=settings,
        journal=Journal(home / "journal.sqlite"),
        snapshots=LocalSnapshots(home / "snapshots"),
        images=ImageLibrary(home / "images"),
        slots=SlotRegistry(settings.runtime_dir, pool_size=settings.net_pool),
        driver=driver or choose_driver(settings),
        reporter=reporter or Silent(),
    )
