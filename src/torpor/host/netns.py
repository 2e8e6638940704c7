"""Network namespaces: make one under a name, work inside one, remove one.

namespaces(7), ip-netns(8): a namespace lives as long as something holds it; a bind mount of
/proc/thread-self/ns/net below /run/netns is how `ip netns` gives it a name, and so do we.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SHARED: Final = 1 << 20
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def create_namespace(path: Path) -> None:
    """Make a new network namespace and mount it at `path`, as `ip netns add` would.

    Raises FileExistsError, OSError; nothing is left at `path` on failure.
    """
    _share_directory(path.parent)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        _in_thread(lambda: _unshare_and_mount(path))
    except BaseException:
        remove_namespace(path)
        raise


def remove_namespace(path: Path) -> None:
    """Take a namespace's name away; with its last holder it ends. Idempotent."""
    with contextlib.suppress(OSError):
        _check(_libc.umount2(os.fsencode(path), _MNT_DETACH))
    path.unlink(missing_ok=True)


def in_namespace(path: Path, work: Callable[[], T]) -> T:
    """Run `work` in a fresh thread inside the namespace; its sockets and children stay there.

    Raises FileNotFoundError when there is no such namespace, else what `work` raises.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:

        def enter() -> T:
            _check(_libc.setns(descriptor, _CLONE_NEWNET))
            return work()

        return _in_thread(enter)
    finally:
        os.close(descriptor)


def is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted at `path`."""
    wanted = str(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == wanted and fields[fields.index("-") + 1] == "nsfs":
            return True
    return False


def _unshare_and_mount(path: Path) -> None:
    _check(_libc.unshare(_CLONE_NEWNET))
    _mount(b"/proc/thread-self/ns/net", path, _MS_BIND)


def _share_directory(directory: Path) -> None:
    """Make the directory a shared mount, so that namespaces made now are seen in all mounts."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        _mount(b"", directory, _MS_SHARED | _MS_REC)
    except OSError:  # not a mount point yet
        _mount(os.fsencode(directory), directory, _MS_BIND | _MS_REC)
        _mount(b"", directory, _MS_SHARED | _MS_REC)


def _mount(source: bytes, target: Path, flags: int) -> None:
    _check(_libc.mount(source, os.fsencode(target), b"none", ctypes.c_ulong(flags), None))


def _in_thread(work: Callable[[], T]) -> T:
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
