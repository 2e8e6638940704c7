"""Programs that mount things or leave children behind, run where neither can outlive them.

unshare(1) gives them a mount namespace, from which no mount reaches the host, and a PID namespace:
when its first process ends, the kernel ends all others in it, and their mounts with them.
setpriv(1) ties that to us: if our thread or process dies, however it does, so does the program
(prctl(2), PR_SET_PDEATHSIG). The shell in between covers the moment before the tie was made, and
sets the umask.
"""

from __future__ import annotations

import os
import shlex
import shutil
from typing import TYPE_CHECKING, Final

from torpor.errors import HostUnfit, ProgramFailed
from torpor.host.process import clean_environment, run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_TIE: Final = ("setpriv", "--pdeathsig", "KILL", "sh", "-c")
_ENTER: Final = 'test "$PPID" = "$0" || exit 1; umask 022; exec "$@"'
_UNSHARE: Final = (
    *("unshare", "--mount", "--propagation", "private", "--mount-proc"),
    *("--pid", "--fork", "--kill-child"),
)


def run_enclosed(argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> str:
    """Run a program as `process.run` does, in namespaces of its own and with umask 022.

    Blocking; needs root. When this returns or raises, nothing of the program can start any more;
    killed processes may still be finishing their last system call. Raises what `run` raises.
    """
    words = [str(word) for word in argv]
    if shutil.which(words[0], path=clean_environment()["PATH"]) is None:
        raise HostUnfit(f"{words[0]} is not installed", hint="run `torpor doctor`, or `make setup`")
    try:
        return run(
            [*_TIE, _ENTER, str(os.getpid()), *_UNSHARE, *words],
            env=env,
            hint=f"the command was: {shlex.join(words)}",
        )
    except ProgramFailed as error:
        ending = error.message.removeprefix(_TIE[0])
        raise ProgramFailed(f"{words[0]}{ending}", reason=error.reason, hint=error.hint) from None
