"""The files of a function: what may be among them, and the tree that becomes its app disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from torpor.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torpor.image.spec import AppFile


def find_unfit(source: Path, directory: Path) -> str | None:
    """Why `source`, in a function's `directory`, cannot go into an app; None when it can.

    Blocking. A link may lead anywhere inside the directory; what is no file, directory or link
    cannot be packed.
    """
    home = directory.resolve()
    for path in _walk(source):
        shown = path.relative_to(directory)
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            given = os.readlink(path)
            if os.path.isabs(given) or not (path.parent / given).resolve().is_relative_to(home):
                return f"link {shown} -> {given} is not inside {directory}"
        elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return f"{shown} is neither a file nor a directory"
    return None


def lay_out(files: Sequence[AppFile], tree: Path) -> None:
    """Copy the files to their places below the directory `tree`; later ones win.

    Modes are 755 for directories and programs, else 644, whatever the umask. Raises InvalidInput
    for a file that is gone or whose place is taken by something of another kind.
    """
    for file in files:
        target = tree / file.target.relative_to("/")
        try:
            _place(file.source, target, tree)
        except (OSError, shutil.Error) as error:
            if os.strerror(errno.ENOSPC) in str(error):
                raise
            raise InvalidInput(
                f"{file.source} cannot be put to {file.target}", reason=str(error)
            ) from None
    for path in _walk(tree):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)


def _place(source: Path, target: Path, tree: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(tree.resolve()):
        raise NotADirectoryError(f"a link leads out of the app at {target.parent.name}")
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    elif target.is_dir() or target.is_symlink():
        raise IsADirectoryError("there is a directory or a link already")
    else:
        shutil.copyfile(source, target)
        target.chmod(source.stat().st_mode & 0o777)


def _walk(top: Path) -> Iterator[Path]:
    """`top`, unless it is a link, and all below it; links below are not followed."""
    if not top.is_symlink():
        yield top
    for directory, names, files in os.walk(top):
        yield from (Path(directory, name) for name in (*names, *files))
