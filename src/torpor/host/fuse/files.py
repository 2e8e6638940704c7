"""What a file system has to know: nodes, their names, their bytes.

The kernel keeps node ids for as long as the mount lives, a server does not. So an id follows from
the node's path alone: a server that takes over knows the same nodes without having seen one lookup.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from blake3 import blake3

from torpor.errors import InvalidInput
from torpor.host.fuse.layouts import ROOT_ID

if TYPE_CHECKING:
    from collections.abc import Callable

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer]
"""The bytes of a read: in one piece, or in a list of pieces (at most 1000)."""

_NAME_BYTES: Final = 255
_ID_BITS: Final = (1 << 62) - 1
_ID_BASE: Final = 1 << 62  # above the root's id and the places of "." and "..", positive as off_t


class Call:
    """One request under way. A handler that waits says so, and may watch for its interruption.

    The reader got a signal, so an early EINTR is better than late bytes; ignoring it is allowed.

    `may_wait` is to be called, in the thread that handles the request, before anything that may
    take long: other requests are taken meanwhile. Again is no change.
    """

    def __init__(self, may_wait: Callable[[], None] = lambda: None) -> None:
        self.may_wait: Final = may_wait
        self._lock = threading.Lock()
        self._interrupted = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def interrupted(self) -> bool:
        """Whether the reader asked to be let go; raise InterruptedError to do so."""
        return self._interrupted

    def on_interrupt(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once, at once if it is too late to wait for.

        It runs in another worker's thread (or in the caller's) and must not block or raise.
        """
        with self._lock:
            if not self._interrupted:
                self._callbacks.append(callback)
                return
        callback()

    def interrupt(self) -> None:
        """Mark the call and tell its watchers; any thread, any number of times."""
        with self._lock:
            self._interrupted = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


@dataclass(frozen=True)
class Node:
    """A file or directory; `parts` is its path below the mount point, () for the root.

    Content and size of a file never change.
    """

    id: int
    parts: tuple[str, ...]
    is_directory: bool
    size_bytes: int = 0
    changed_s: int = 0

    @property
    def name(self) -> str:
        """The last part, empty for the root."""
        return self.parts[-1] if self.parts else ""


def node_id(parts: Sequence[str]) -> int:
    """The id of the node at a path: 62 bits of a hash, the same in every process."""
    if not parts:
        return ROOT_ID
    digest = blake3("/".join(parts).encode()).digest(8)
    return _ID_BASE | int.from_bytes(digest, "little") & _ID_BITS


class Files(Protocol):
    """What a server asks. Called in many threads at once; an OSError becomes the reader's errno.

    Any other exception is logged and becomes EIO. Only `read` may wait. The server process must not
    open files of its own mount in these methods, or it waits for itself.
    """

    def node(self, node: int, /) -> Node:
        """The node with this id; raises OSError(ESTALE) when there is none."""
        ...

    def lookup(self, parent: Node, name: str, /) -> Node:
        """The entry of a directory; raises FileNotFoundError."""
        ...

    def entries(self, directory: Node, /) -> Sequence[Node]:
        """All entries of a directory, in any order."""
        ...

    def read(self, node: Node, offset: int, length: int, call: Call, /) -> Data:
        """Exactly the `length` bytes from `offset` on, which end within the file.

        It may wait when it has told the call (see there). What it returns must not change until
        the reader has it. Raises OSError.
        """
        ...


@dataclass
class Tree:
    """Directories and files by path, for the three methods of `Files` that are about names.

    Any thread may add and remove; directories come and go with the files in them.
    """

    _nodes: dict[int, Node] = field(default_factory=dict)
    _children: dict[int, dict[str, Node]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        root = Node(ROOT_ID, (), is_directory=True)
        self._nodes[ROOT_ID] = root
        self._children[ROOT_ID] = {}

    def add(self, parts: Sequence[str], *, size_bytes: int, changed_s: int = 0) -> Node:
        """Add a file and the directories above it; the same file again is no change.

        Raises InvalidInput for a name that cannot be one, for another size, and where a file
        would be a directory too.
        """
        for part in parts:
            _check_name(part)
        if not parts:
            raise InvalidInput("a file needs a name")
        with self._lock:
            for depth in range(1, len(parts)):
                self._put(tuple(parts[:depth]), is_directory=True)
            return self._put(
                tuple(parts), is_directory=False, size_bytes=size_bytes, changed_s=changed_s
            )

    def remove(self, parts: Sequence[str]) -> Node:
        """Take a file away, with directories above it that are empty now.

        The kernel may know it still: see `Server.forget`. Raises FileNotFoundError.
        """
        with self._lock:
            node = self._nodes.get(node_id(parts))
            if node is None or node.is_directory:
                raise FileNotFoundError(errno.ENOENT, "no such file", "/".join(parts))
            self._drop(node)
            for depth in range(len(parts) - 1, 0, -1):
                above = self._nodes[node_id(parts[:depth])]
                if self._children[above.id]:
                    break
                del self._children[above.id]
                self._drop(above)
            return node

    def node(self, node: int, /) -> Node:
        """The node with this id; raises OSError(ESTALE)."""
        found = self._nodes.get(node)
        if found is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return found

    def lookup(self, parent: Node, name: str, /) -> Node:
        """The entry of a directory; raises FileNotFoundError."""
        found = self._children.get(parent.id, {}).get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return found

    def entries(self, directory: Node, /) -> Sequence[Node]:
        """All entries of a directory."""
        with self._lock:
            return list(self._children.get(directory.id, {}).values())

    def _put(
        self, parts: tuple[str, ...], *, is_directory: bool, size_bytes: int = 0, changed_s: int = 0
    ) -> Node:
        node = Node(node_id(parts), parts, is_directory, size_bytes, changed_s)
        known = self._nodes.get(node.id)
        if known is not None:
            same = (known.parts, known.is_directory, known.size_bytes)
            if same != (parts, is_directory, size_bytes):
                raise InvalidInput(f"{'/'.join(parts)} is there already as another file")
            return known
        self._nodes[node.id] = node
        self._children[node_id(parts[:-1])][node.name] = node
        if is_directory:
            self._children[node.id] = {}
        return node

    def _drop(self, node: Node) -> None:
        del self._nodes[node.id]
        del self._children[node_id(node.parts[:-1])][node.name]


def _check_name(name: str) -> None:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise InvalidInput(f"not a file name: {name[:80]!r}")
    if len(name.encode()) > _NAME_BYTES:
        raise InvalidInput(f"a file name of {len(name.encode())} bytes, at most {_NAME_BYTES}")
