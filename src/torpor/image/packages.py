"""Debian packages to a root file system, as a tar that is the same wherever it is made.

mmdebstrap(1) unpacks and configures the packages; the archive, its keys and its proxies are the
host's own. It mounts proc, sys and dev in the tree that it makes: it runs enclosed, so that the
host never sees them. What a function never reads (documentation, translations) is left out.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit, InvalidInput, ProgramFailed
from torpor.host.enclosure import run_enclosed

if TYPE_CHECKING:
    from collections.abc import Sequence

_APT: Final = Path("/etc/apt")
_EXCLUDED: Final = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*"),
    *("/usr/share/lintian/*", "/usr/share/bug/*", "/usr/share/i18n/*"),
)
_OF_THE_HOST: Final = (
    *("var/lib/apt", "var/cache/*", "var/log/*", "var/lib/dpkg/*-old"),
    *("etc/hostname", "etc/resolv.conf", "etc/apt/sources.list", "etc/apt/sources.list.d/*"),
)
"""What mmdebstrap leaves of this host and this day: an image is the same wherever it is built."""
_MISSING = re.compile(r"Unable to locate package (\S+)|Package '?([^ ']+)'? has no installation")


def packages_to_tar(packages: Sequence[str], tar: Path, *, suite: str) -> None:
    """Install packages into an empty root and pack it. Blocking, needs root and the archive.

    Raises InvalidInput naming a package that does not exist, ProgramFailed with apt's words.
    """
    include = ",".join(packages)
    look = f"apt-get --quiet --simulate install {shlex.join(packages)}" if packages else "true"
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED]
    command = [
        *("mmdebstrap", "--mode=root", "--variant=essential", f"--include={include}", *excluded),
        *('--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"'),
        # what does not exist is told before half a minute of unpacking; mmdebstrap sees that the
        # lists are there
        '--setup-hook=export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"'
        f" && apt-get --quiet update --error-on=any && {look} >&2",
        f'--customize-hook=cd "$1" && rm -rf {" ".join(_OF_THE_HOST)}',
        *(suite, str(tar), *(str(path) for path in apt_sources())),
    ]
    try:
        run_enclosed(command, env={"SOURCE_DATE_EPOCH": "0", "TMPDIR": str(tar.parent)})
    except ProgramFailed as error:
        missing = _MISSING.search(error.reason)
        if missing is not None:
            raise InvalidInput(
                f"there is no Debian package {missing[1] or missing[2]!r} in {suite}",
                hint="check its name with `apt-cache search`",
            ) from None
        raise


def apt_sources() -> list[Path]:
    """The host's own apt source files. Raises HostUnfit when it has none."""
    found = [_APT / "sources.list", *sorted((_APT / "sources.list.d").glob("*.list"))]
    found += sorted((_APT / "sources.list.d").glob("*.sources"))
    used = [path for path in found if path.is_file() and _is_debian(path.read_text())]
    if not used:
        raise HostUnfit(
            "apt has no Debian sources on this host", hint=f"see {_APT}/sources.list(5)"
        )
    return used


def debian_suite() -> str:
    """The host's Debian release, `bookworm`; images are made of the same."""
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    raise HostUnfit("this host is not Debian", reason="/etc/os-release has no VERSION_CODENAME")


def _is_debian(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return "debian" in "\n".join(lines)
