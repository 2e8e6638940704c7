"""A seccomp filter for children whose huge pages would cost more than they save.

QEMU advises MADV_HUGEPAGE for all guest memory and cannot be told not to. For a private mapping of
a file that makes the kernel read 2 MiB round each page that is missing (do_sync_mmap_readahead in
mm/filemap.c), which is 128 windows from a store where one was touched. The filter answers that
advice with EINVAL, as a kernel without huge pages does; QEMU goes on without.

Sources: seccomp(2), prctl(2), linux/filter.h, linux/seccomp.h, linux/audit.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final

from torpor.errors import HostUnfit

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NUMBER, _ARCHITECTURE, _THIRD_ARGUMENT = 0, 4, 32  # offsets in struct seccomp_data
_MADV_HUGEPAGE: Final = 14
_MADVISE: Final = {"x86_64": (0xC000003E, 28), "aarch64": (0xC00000B7, 233)}

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_huge_pages() -> None:
    """Install the filter in the calling thread, for good; its later children inherit it.

    Call it in a thread that does nothing but start the child. Raises HostUnfit.
    """
    known = _MADVISE.get(platform.machine())
    if known is None:
        return
    architecture, madvise = known
    instructions = (
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_IF_EQUAL, 0, 4, architecture),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 2, madvise),
        (_LOAD, 0, 0, _THIRD_ARGUMENT),
        (_JUMP_IF_EQUAL, 1, 0, _MADV_HUGEPAGE),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_ERRNO | errno.EINVAL),
    )
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(instructions), ctypes.cast(buffer, ctypes.c_void_p))
    if os.geteuid() != 0:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1, None)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _prctl(option: int, value: int, pointer: object) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), pointer, 0, 0) != 0:
        number = ctypes.get_errno()
        raise HostUnfit("a seccomp filter cannot be installed", reason=os.strerror(number))
