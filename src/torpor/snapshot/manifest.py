"""The manifest: everything that a snapshot consists of and everything that it needs of a host.

It is one JSON object, encoded by msgspec with sorted keys and no white space, so that equal
manifests have equal bytes; the BLAKE3 digest of those bytes names the snapshot.
"""

from __future__ import annotations

from typing import Literal

import blake3
import msgspec

from torpor.errors import Damaged, Incompatible, InvalidInput
from torpor.units import Digest, parse_digest

FORMAT = 1

Kind = Literal["base", "function", "instance"]


class SparseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file with holes: its length, where its data is, and the digest of the data.

    `extents` are (offset, length) in bytes, ascending, not touching; everything between is zeros.
    `digest` is BLAKE3 over the bytes of the extents, one after the other.
    """

    size_bytes: int
    extents: tuple[tuple[int, int], ...]
    digest: Digest

    @property
    def data_bytes(self) -> int:
        """Bytes in the extents: what is stored and what travels."""
        return sum(length for _, length in self.extents)


class PlainFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file without holes and the BLAKE3 digest of its bytes."""

    size_bytes: int
    digest: Digest


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a host the frozen device state and memory depend on."""

    architecture: str
    vmm: str
    vmm_version: str
    machine_type: str
    accelerator: str
    cpu_model: str
    cpu_vendor: str
    cpu_flags: tuple[str, ...]
    page_bytes: int
    kernel: Digest

    def differences(self, host: Platform) -> list[str]:
        """One phrase for each way in which `host` cannot run what was made on this platform."""
        found = [
            f"{name.replace('_', ' ')} is {theirs} in the snapshot, {ours} on this host"
            for name in self.__struct_fields__
            if name != "cpu_flags"
            and (theirs := getattr(self, name)) != (ours := getattr(host, name))
        ]
        missing = sorted(set(self.cpu_flags) - set(host.cpu_flags))
        if missing:
            found.append(f"CPU flags missing on this host: {' '.join(missing)}")
        return found


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the VM."""

    memory_bytes: int
    vcpus: int
    scratch_bytes: int
    app_bytes: int


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node must know of a function to invoke an instance of it."""

    name: str
    revision: int
    port: int
    app: Digest


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A snapshot: memory, device state and scratch disk of one instant.

    A base has no parent and no function; every other kind has both. `created_ns` is the host's
    CLOCK_REALTIME at the pause.
    """

    format: int = FORMAT
    kind: Kind
    created_ns: int
    parent: Digest | None
    platform: Platform
    machine: Machine
    image: Digest
    function: Function | None
    memory: SparseFile
    disk: SparseFile
    vmstate: PlainFile


def encode_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of a manifest."""
    return msgspec.json.encode(manifest, order="sorted")


def manifest_digest(encoded: bytes) -> Digest:
    """The name of the snapshot with these manifest bytes."""
    return Digest(blake3.blake3(encoded).hexdigest())


def decode_manifest(encoded: bytes, digest: Digest) -> Manifest:
    """The manifest in `encoded`, which must have this digest.

    Raises Damaged when the bytes are not the named ones or make no sense, Incompatible when a
    newer torpor wrote them.
    """
    if manifest_digest(encoded) != digest:
        raise Damaged(f"manifest of snapshot {digest[:12]} has another digest than its name")
    try:
        version = msgspec.json.decode(encoded, type=_Versioned).format
    except msgspec.MsgspecError as error:
        raise Damaged(
            f"manifest of snapshot {digest[:12]} cannot be read", reason=str(error)
        ) from None
    if version > FORMAT:
        raise Incompatible(
            f"snapshot {digest[:12]} has format {version}",
            reason=f"this torpor reads formats up to {FORMAT}",
            hint="install a newer torpor on this node",
        )
    try:
        manifest = msgspec.json.decode(encoded, type=Manifest)
    except msgspec.MsgspecError as error:
        raise Damaged(
            f"manifest of snapshot {digest[:12]} cannot be read", reason=str(error)
        ) from None
    problem = find_problem(manifest)
    if problem:
        raise Damaged(f"manifest of snapshot {digest[:12]} is inconsistent", reason=problem)
    return manifest


class _Versioned(msgspec.Struct):
    format: int


def find_problem(manifest: Manifest) -> str:
    """The first way in which a manifest contradicts itself, or an empty string."""
    for name, file, size_bytes in (
        ("memory", manifest.memory, manifest.machine.memory_bytes),
        ("disk", manifest.disk, manifest.machine.scratch_bytes),
    ):
        if file.size_bytes != size_bytes:
            return f"{name} has {file.size_bytes} bytes, the machine needs {size_bytes}"
        end = -1
        for offset, length in file.extents:
            if offset <= end or length <= 0 or offset + length > file.size_bytes:
                return f"{name} extents overlap or lie outside the file"
            end = offset + length
    for digest in (
        manifest.image,
        manifest.memory.digest,
        manifest.disk.digest,
        manifest.vmstate.digest,
    ):
        try:
            parse_digest(digest)
        except InvalidInput as error:
            return str(error)
    if (manifest.kind == "base") != (manifest.function is None):
        return f"kind {manifest.kind} and its function entry do not fit"
    return ""
