"""The snapshots of one node: a directory each, named by its digest, immutable once it is there.

ROOT/<digest>/manifest.json  memory  vmstate  disk  [written.json  working-set.json]
ROOT/<digest>/manifest.json  served.json  vmstate  disk  [working-set.json]     the pager has memory
ROOT/.staging-<pid>-<start>-<random>/     being made, by that process
ROOT/.removed-<pid>-<start>-<random>/     being deleted
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from torpor.errors import Conflict, Damaged, Incompatible, InvalidInput, NoSpace, NotFound
from torpor.host.process import ProcessId
from torpor.host.space import no_space_of
from torpor.host.sparse import blake3_file, describe_sparse
from torpor.snapshot.manifest import (
    Function,
    Kind,
    Machine,
    Manifest,
    PlainFile,
    Platform,
    SparseFile,
    decode_manifest,
    encode_manifest,
    manifest_digest,
)
from torpor.snapshot.windows import Touched
from torpor.structs import prepared
from torpor.units import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_WRITTEN: Final = "written.json"
_SERVED: Final = "served.json"
_WORKING_SET: Final = "working-set.json"
_STAGING: Final = ".staging-"
_REMOVED: Final = ".removed-"
_SHORTEST_PREFIX: Final = 6


@dataclass(frozen=True)
class LocalSnapshot:
    """A snapshot on this node and its files, which nobody writes any more."""

    digest: Digest
    manifest: Manifest
    directory: Path
    served: Path | None = None
    """Where a pager serves the memory, None when it is here."""

    @property
    def memory(self) -> Path:
        """Guest memory: sparse, or a pager's file while one serves it."""
        return self.served or self.directory / "memory"

    @property
    def vmstate(self) -> Path:
        """Device state."""
        return self.directory / "vmstate"

    @property
    def disk(self) -> Path:
        """The scratch disk, sparse."""
        return self.directory / "disk"

    def written(self) -> tuple[tuple[int, int], ...] | None:
        """Where memory was written since the parent: (offset, length) runs, ascending.

        None when this node does not know, as for a snapshot that came from elsewhere.
        """
        try:
            encoded = (self.directory / _WRITTEN).read_bytes()
            return msgspec.json.decode(encoded, type=tuple[tuple[int, int], ...])
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def working_set(self) -> tuple[Touched, ...]:
        """The windows that a woken function touches, as trials found; () if nothing is known."""
        try:
            encoded = (self.directory / _WORKING_SET).read_bytes()
            return msgspec.json.decode(encoded, type=prepared(tuple[Touched, ...]))
        except (FileNotFoundError, msgspec.MsgspecError):
            return ()

    def record_working_set(self, touched: Sequence[Touched]) -> None:
        """Keep what trials found, in place of what was known; it appears whole. Raises NoSpace."""
        fresh = self.directory / f".{_WORKING_SET}-{os.getpid()}"
        try:
            fresh.write_bytes(msgspec.json.encode(touched))
            fresh.rename(self.directory / _WORKING_SET)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise NoSpace("a working set could not be kept", reason=str(error)) from None

    def disk_usage_bytes(self) -> int:
        """Bytes that the files occupy, as far as they are still there.

        Pages shared by reflinks count in full.
        """
        return _disk_usage_bytes(self.directory)


@dataclass(frozen=True)
class Unreadable:
    """A snapshot's directory of which this torpor can make nothing, why, and its bytes."""

    digest: Digest
    error: Incompatible | Damaged
    disk_usage_bytes: int


@dataclass(frozen=True)
class Staging:
    """A directory where a snapshot's files are put before it is published."""

    root: Path
    directory: Path

    @property
    def memory(self) -> Path:
        """Where the memory goes."""
        return self.directory / "memory"

    @property
    def vmstate(self) -> Path:
        """Where the device state goes."""
        return self.directory / "vmstate"

    @property
    def disk(self) -> Path:
        """Where the scratch disk goes."""
        return self.directory / "disk"

    def record_written(self, runs: Sequence[tuple[int, int]]) -> None:
        """Keep where memory differs from the parent's: a push then reads only that."""
        (self.directory / _WRITTEN).write_bytes(msgspec.json.encode(runs))

    def record_working_set(self, touched: Sequence[Touched]) -> None:
        """Keep which windows a woken function touches, if anything is known of that."""
        if touched:
            (self.directory / _WORKING_SET).write_bytes(msgspec.json.encode(touched))

    def publish(
        self,
        *,
        kind: Kind,
        created_ns: int,
        parent: Digest | None,
        platform: Platform,
        machine: Machine,
        image: Digest,
        function: Function | None,
    ) -> Digest:
        """Hash the three files, write the manifest, and let the snapshot appear at once."""
        manifest = Manifest(
            kind=kind,
            created_ns=created_ns,
            parent=parent,
            platform=platform,
            machine=machine,
            image=image,
            function=function,
            memory=_describe(self.memory),
            disk=_describe(self.disk),
            vmstate=PlainFile(self.vmstate.stat().st_size, blake3_file(self.vmstate)),
        )
        encoded = encode_manifest(manifest)
        return self.publish_as(encoded, manifest_digest(encoded))

    def publish_served(self, encoded: bytes, digest: Digest, *, memory: Path) -> Digest:
        """Let a snapshot appear whose memory a pager serves at `memory`.

        Nothing waits for the disk: a snapshot that a crash makes incomplete is fetched again.
        """
        (self.directory / "manifest.json").write_bytes(encoded)
        (self.directory / _SERVED).write_bytes(msgspec.json.encode({"memory": str(memory)}))
        for path in self.directory.iterdir():
            path.chmod(0o400)
        self._appear(digest)
        return digest

    def publish_as(self, encoded: bytes, digest: Digest) -> Digest:
        """Let the snapshot appear under a manifest that describes the files already.

        One whose memory a pager served until now is complete then: VMs that map that go on.
        """
        (self.directory / "manifest.json").write_bytes(encoded)
        for path in self.directory.iterdir():
            path.chmod(0o400)
            _sync(path)
        if not self._appear(digest):
            there = self.root / digest
            with contextlib.suppress(FileNotFoundError):  # it is complete
                (there / _SERVED).stat()
                self.memory.rename(there / self.memory.name)
                (there / _SERVED).unlink()
                _sync(there)
        _sync(self.root)
        return digest

    def _appear(self, digest: Digest) -> bool:
        """False when a snapshot of that digest is there already."""
        try:
            self.directory.rename(self.root / digest)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True


class LocalSnapshots:
    """The snapshots below one directory. Blocking; safe from any number of processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextlib.contextmanager
    def stage(self) -> Iterator[Staging]:
        """A staging directory, gone after the body whether it was published or not.

        Raises NoSpace.
        """
        directory = self.root / f"{_STAGING}{unique_name()}"
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise no_space_of(error, directory) from None
        try:
            yield Staging(self.root, directory)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def get(self, digest: str) -> LocalSnapshot:
        """A snapshot after a cheap check: manifest, sizes, and the device state's digest.

        Raises NotFound, Incompatible for a newer format, Damaged naming the file. `verify` is
        the check that reads everything.
        """
        directory = self.root / digest
        try:
            encoded = (directory / "manifest.json").read_bytes()
        except FileNotFoundError:
            raise NotFound(
                f"there is no snapshot {digest[:12]} on this node",
                hint="`torpor snapshot ls` lists them, `torpor snapshot pull` fetches one",
            ) from None
        manifest = decode_manifest(encoded, Digest(digest))
        snapshot = LocalSnapshot(
            Digest(digest), manifest, directory, served=_read_served(directory)
        )
        files = [
            (snapshot.disk, manifest.disk.size_bytes),
            (snapshot.vmstate, manifest.vmstate.size_bytes),
        ]
        if snapshot.served is None:
            files.append((snapshot.memory, manifest.memory.size_bytes))
        for path, size in files:
            if not path.exists():
                raise _damaged(digest, path, "it is missing")
            if path.stat().st_size != size:
                raise _damaged(digest, path, f"it has {path.stat().st_size} bytes, not {size}")
        if blake3_file(snapshot.vmstate) != manifest.vmstate.digest:
            raise _damaged(digest, snapshot.vmstate, "its digest is another")
        return snapshot

    def verify(self, digest: str) -> LocalSnapshot:
        """Read every byte of a snapshot. Raises Damaged naming the file."""
        snapshot = self.get(digest)
        for path, file in (
            (snapshot.memory, snapshot.manifest.memory),
            (snapshot.disk, snapshot.manifest.disk),
        ):
            content = describe_sparse(path)
            if (content.digest, content.extents) != (file.digest, file.extents):
                raise _damaged(digest, path, "its content is another")
        return snapshot

    def list(self) -> list[LocalSnapshot]:
        """All snapshots that can be read, oldest first.

        Raises Incompatible when a newer torpor's is here: what that one needs cannot be told.
        """
        found, unreadable = self.survey()
        for one in unreadable:
            if isinstance(one.error, Incompatible):
                raise one.error
        return [*found]

    def survey(self) -> tuple[Sequence[LocalSnapshot], Sequence[Unreadable]]:
        """All snapshots that can be read, oldest first, and those that cannot, by digest."""
        found, unreadable = [], []
        for directory in sorted(self.root.glob("[!.]*")):
            try:
                found.append(self.get(directory.name))
            except NotFound:  # it is just deleted, or has lost its manifest
                pass
            except (Incompatible, Damaged) as error:
                used_bytes = _disk_usage_bytes(directory)
                unreadable.append(Unreadable(Digest(directory.name), error, used_bytes))
        return sorted(found, key=lambda snapshot: snapshot.manifest.created_ns), unreadable

    def resolve(self, prefix: str) -> LocalSnapshot:
        """A snapshot by the beginning of its digest, at least six digits.

        Raises InvalidInput for less, NotFound, Conflict when it fits several.
        """
        if len(prefix) < _SHORTEST_PREFIX or not set(prefix) <= set("0123456789abcdef"):
            raise InvalidInput(
                f"not a digest: {prefix[:80]!r}",
                hint=f"give at least {_SHORTEST_PREFIX} hexadecimal digits",
            )
        found = [path.name for path in self.root.iterdir() if path.name.startswith(prefix)]
        if len(found) > 1:
            raise Conflict(f"{prefix!r} fits {len(found)} snapshots", hint="give more digits")
        return self.get(found[0] if found else prefix)

    def remove(self, digest: str) -> None:
        """Delete a snapshot; VMs that map its memory go on. Raises NotFound."""
        doomed = self.root / f"{_REMOVED}{unique_name()}"
        try:
            (self.root / digest).rename(doomed)
        except FileNotFoundError:
            raise NotFound(f"there is no snapshot {digest[:12]} on this node") from None
        shutil.rmtree(doomed, ignore_errors=True)

    def sweep(self) -> None:
        """Delete what dead processes were making or deleting."""
        for path in self.root.glob(".*-*"):
            maker = parse_unique(path.name.partition("-")[2])
            if maker is not None and not maker.is_alive():
                shutil.rmtree(path, ignore_errors=True)


def _disk_usage_bytes(directory: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):  # another command deletes it just now
        for path in directory.iterdir():
            total += path.stat().st_blocks * 512
    return total


def _read_served(directory: Path) -> Path | None:
    try:
        encoded = (directory / _SERVED).read_bytes()
        return Path(msgspec.json.decode(encoded, type=dict[str, str])["memory"])
    except (FileNotFoundError, msgspec.MsgspecError, KeyError):
        return None


def _describe(path: Path) -> SparseFile:
    content = describe_sparse(path)
    return SparseFile(content.size_bytes, content.extents, content.digest)


def _damaged(digest: str, path: Path, reason: str) -> Damaged:
    return Damaged(
        f"{path.name} of snapshot {digest[:12]} is damaged",
        reason=reason,
        hint="pull it again, or deploy the function again",
    )


def parse_unique(name: str) -> ProcessId | None:
    """Which process made a `unique_name`; None for another kind of name."""
    parts = name.split("-")
    if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
        return None
    return ProcessId(int(parts[0]), int(parts[1]))


def unique_name() -> str:
    """A fresh file name that tells which process made it."""
    me = ProcessId.of(os.getpid())
    return f"{me.pid}-{me.start_ticks}-{secrets.token_hex(4)}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
