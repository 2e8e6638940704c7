"""The Firecracker binary: where it is, which version it has, what that version understands."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from torpor.errors import HostUnfit, InvalidInput, TorporError
from torpor.host import cpu, process

if TYPE_CHECKING:
    from torpor.config import Settings

OLDEST: Final = (1, 12)
"""The first version whose API torpor speaks."""

_TRACKS_BY_OWN_NAME: Final = (1, 13)
_ANSWER_TIMEOUT_S: Final = 20.0
_VERSION = re.compile(r"^Firecracker v(\d+)\.(\d+)\.(\d+)\S*$", re.MULTILINE)
_HINT: Final = "docs/firecracker.md says which binary to get and where to put it"


@dataclass(frozen=True, order=True)
class Version:
    """A Firecracker version; `str()` gives `1.16.1`."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def tracking_field(self) -> str:
        """The field of /snapshot/load that turns dirty page tracking on.

        1.13 renamed it; the old name is deprecated since.
        """
        known = (self.major, self.minor) >= _TRACKS_BY_OWN_NAME
        return "track_dirty_pages" if known else "enable_diff_snapshots"


def parse_version(words: str) -> Version:
    """The version in what `firecracker --version` prints.

    Raises HostUnfit when there is none, or when it is older than `OLDEST`.
    """
    found = _VERSION.search(words)
    if found is None:
        line = words.strip().partition("\n")[0]
        raise HostUnfit("this is no Firecracker", reason=line[:200], hint=_HINT)
    version = Version(*map(int, found.groups()))
    if (version.major, version.minor) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise HostUnfit(
            f"Firecracker {version} is too old", reason=f"torpor needs {oldest}", hint=_HINT
        )
    return version


def find_version(program: str) -> Version:
    """The version of an installed binary. Blocking; raises HostUnfit."""
    where = shutil.which(program)
    if where is None:
        raise HostUnfit(f"there is no Firecracker binary {program}", hint=_HINT)
    return _version_of(where, os.stat(where).st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _version_of(program: str, mtime_ns: int) -> Version:  # a replaced binary is asked again
    try:
        words = process.run([program, "--version"], timeout_s=_ANSWER_TIMEOUT_S)
    except (TorporError, OSError) as error:
        raise HostUnfit(f"{program} cannot be run", reason=str(error), hint=_HINT) from None
    return parse_version(words)


def require_kvm(accelerator: Literal["auto", "tcg", "kvm"]) -> None:
    """Raise what keeps Firecracker from running here: InvalidInput for TCG, HostUnfit."""
    if accelerator == "tcg":
        raise InvalidInput(
            "Firecracker runs under KVM only, the accelerator is set to tcg",
            hint="set the accelerator auto, or the VMM qemu",
        )
    problem = cpu.kvm_problem()
    if problem:
        raise HostUnfit(
            "Firecracker needs KVM",
            reason=problem,
            hint="use the VMM qemu, which can do without",
        )


def is_usable(settings: Settings) -> bool:
    """Whether `auto` takes Firecracker: KVM and a binary that torpor speaks to are here."""
    try:
        require_kvm(settings.accelerator)
        find_version(settings.firecracker)
    except (HostUnfit, InvalidInput):
        return False
    return True
