"""Children without huge pages: one advice is refused to them, and nothing changes here."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.pagers import until
from torpor.errors import HostUnfit
from torpor.host.process import spawn
from torpor.host.seccomp import refuse_huge_pages

if TYPE_CHECKING:
    from collections.abc import Callable

ADVISE = """
import errno, mmap
memory = mmap.mmap(-1, 4 << 20)
for name in ("MADV_HUGEPAGE", "MADV_NORMAL", "MADV_WILLNEED", "MADV_DONTNEED", "MADV_NOHUGEPAGE"):
    try:
        memory.madvise(getattr(mmap, name))
        print(name, "fine")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
memory[:5] = b"works"
print(memory[:5])
"""


def run(tmp_path: Path, program: str, prepare: Callable[[], None] | None) -> list[str]:
    """What a Python program prints that is started so."""
    child = spawn([sys.executable, "-c", program], log=tmp_path / "log", prepare=prepare)
    assert child.wait(timeout_s=60)
    return (tmp_path / "log").read_text().splitlines()


def advise_huge_pages() -> None:
    """Raise OSError where the advice is refused."""
    with mmap.mmap(-1, 4 << 20) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)


def filters() -> set[str]:
    """The seccomp modes of this process's threads (proc(5))."""
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for line in (task / "status").read_text().splitlines():
                if line.startswith("Seccomp:"):
                    found.add(line.split()[1])
    return found


@pytest.fixture(autouse=True)
def kernel_with_huge_pages() -> None:
    """Without huge pages in the kernel the advice is refused anyway."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")


def test_the_child_gets_none(tmp_path: Path) -> None:
    """MADV_HUGEPAGE is EINVAL, as without huge pages; other advice and memory itself work."""
    assert run(tmp_path, ADVISE, refuse_huge_pages) == [
        "MADV_HUGEPAGE EINVAL",
        *(f"MADV_{name} fine" for name in ("NORMAL", "WILLNEED", "DONTNEED", "NOHUGEPAGE")),
        "b'works'",
    ]


def test_without_it_the_child_gets_them(tmp_path: Path) -> None:
    """The refusal is the filter's: another child may advise what it likes."""
    assert run(tmp_path, ADVISE, None)[0] == "MADV_HUGEPAGE fine"


def test_its_children_get_none_either(tmp_path: Path) -> None:
    """What the child starts inherits the filter."""
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ADVISE!r}])"
    assert run(tmp_path, program, refuse_huge_pages)[0] == "MADV_HUGEPAGE EINVAL"


def test_the_parent_is_as_it_was(tmp_path: Path) -> None:
    """Neither the caller nor threads from before or after have a filter."""
    before, asked, done = threading.Event(), threading.Event(), threading.Event()
    errors: list[OSError] = []

    def wait_and_advise() -> None:
        before.set()
        asked.wait(60)
        try:
            advise_huge_pages()
        except OSError as error:
            errors.append(error)
        done.set()

    modes = filters()
    other = threading.Thread(target=wait_and_advise)
    other.start()
    assert before.wait(60)
    run(tmp_path, ADVISE, refuse_huge_pages)
    asked.set()
    assert done.wait(60)
    other.join()
    advise_huge_pages()
    with ThreadPoolExecutor(1) as later:
        later.submit(advise_huge_pages).result()
    assert errors == []
    until(lambda: filters() == modes)  # the thread that had the filter may be ending still


def test_a_preparation_that_fails(tmp_path: Path) -> None:
    """What it raises comes out, and no child was started."""

    def prepare() -> None:
        raise HostUnfit("no filter")

    with pytest.raises(HostUnfit, match="no filter"):
        run(tmp_path, "print('started')", prepare)
    assert not (tmp_path / "log").exists()
