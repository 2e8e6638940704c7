"""The manifest: everything that a snapshot consists of and everything that it needs of a host.

It is one JSON object, encoded by msgspec with sorted keys and no white space, so that equal
manifests have equal bytes; the BLAKE3 digest of those bytes names the snapshot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeVar

import blake3
import msgspec

from torpor.errors import Damaged, Incompatible, InvalidInput
from torpor.structs import prepared
from torpor.units import Digest, parse_digest, parse_name

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT = 1
LARGEST_VMSTATE_BYTES: Final = 1 << 30
_LARGEST: Final = (1 << 63) - 1
_MOST_CPUS: Final = 4096

T = TypeVar("T")

Kind = Literal["base", "function", "instance"]
SnapshotPolicy = Literal["never", "on-deploy", "on-idle"]

SCALE_LIMITS: Final = {
    "concurrency": (1, 10_000),
    "min": (0, 1_000),
    "max": (1, 1_000),
    "idle_ms": (100, 7 * 86_400_000),
    "deadline_ms": (100, 86_400_000),
    "queue": (0, 100_000),
}
"""The least and the most of each number of a Scale."""


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


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What of a host the frozen device state and memory depend on.

    `cpuid` has what guests of the host's own CPU model saw under KVM: the registers of CPUID's
    leaves that have a feature in each bit, `7.0.ebx`, and their bits. It is not written when empty.
    """

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
    cpuid: tuple[tuple[str, int], ...] = ()

    def differences(self, host: Platform) -> list[str]:
        """One phrase for each way in which `host` cannot run what was made on this platform."""
        found = [
            f"{name.replace('_', ' ')} is {theirs} in the snapshot, {ours} on this host"
            for name in self.__struct_fields__
            if name not in ("cpu_flags", "cpuid")
            and (theirs := getattr(self, name)) != (ours := getattr(host, name))
        ]
        missing = sorted(set(self.cpu_flags) - set(host.cpu_flags))
        if missing:
            found.append(f"CPU flags missing on this host: {' '.join(missing)}")
        if (self.accelerator, self.cpu_model) == (host.accelerator, host.cpu_model):
            found += self._missing_features(host)
        return found

    def _missing_features(self, host: Platform) -> list[str]:
        here = dict(host.cpuid)
        missing = {register: bits & ~here.get(register, 0) for register, bits in self.cpuid}
        return [
            f"CPUID {register} on this host lacks {_name_bits(bits)}"
            for register, bits in missing.items()
            if bits
        ]


def _name_bits(bits: int) -> str:
    numbers = [str(number) for number in range(bits.bit_length()) if bits >> number & 1]
    return f"bit{'s' if len(numbers) > 1 else ''} {' '.join(numbers)}"


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the VM."""

    memory_bytes: int
    vcpus: int
    scratch_bytes: int
    app_bytes: int


class Scale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a gateway scales a function on a node.

    An instance takes up to `concurrency` requests at a time. Between `min` and `max` instances run;
    those beyond `min` are stopped after `idle_ms` without a request. A request's answer must begin
    within `deadline_ms`. Up to `queue` requests wait for an instance. `snapshot` says when the
    function's snapshot is replaced by one of an instance that falls asleep: never, once after each
    deploy, or each time.
    """

    concurrency: int = 16
    min: int = 0
    max: int = 8
    idle_ms: int = 60_000
    deadline_ms: int = 60_000
    queue: int = 256
    snapshot: SnapshotPolicy = "never"


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a node must know of a function to invoke an instance of it.

    `scale` is None where function.toml has no [scale]. `refreshed` counts how often the snapshot
    was replaced by one of a running instance since the deploy. Neither is written unless it is set.
    """

    name: str
    revision: int
    port: int
    app: Digest
    scale: Scale | None = None
    refreshed: int = 0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A snapshot: memory, device state and scratch disk of one instant.

    A base has no function, every other kind has one; `parent` is the snapshot that it was restored
    from, None when it was booted. The device state has at most LARGEST_VMSTATE_BYTES. `created_ns`
    is the host's CLOCK_REALTIME at the pause.
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
    return _decode_checked(encoded, digest)


def outline_of(manifest: Manifest) -> Manifest:
    """A manifest without the extents of its files, which can be many: all that a VM starts with."""
    memory, disk = (
        msgspec.structs.replace(file, extents=()) for file in (manifest.memory, manifest.disk)
    )
    return msgspec.structs.replace(manifest, memory=memory, disk=disk)


def decode_outline(encoded: bytes, digest: Digest) -> Manifest:
    """The outline of the snapshot with this digest. Raises as `decode_manifest` does.

    Whether it is that snapshot's nobody can tell before its manifest is here.
    """
    return _decode_checked(encoded, digest)


class _Versioned(msgspec.Struct):
    format: int


def _decode_checked(encoded: bytes, digest: Digest) -> Manifest:
    version = _decode(encoded, _Versioned, digest).format
    if version > FORMAT:
        raise Incompatible(
            f"snapshot {digest[:12]} has format {version}",
            reason=f"this torpor reads formats up to {FORMAT}",
            hint="install a newer torpor on this node",
        )
    manifest = _decode(encoded, Manifest, digest)
    problem = find_problem(manifest)
    if problem:
        raise Damaged(f"manifest of snapshot {digest[:12]} is inconsistent", reason=problem)
    return manifest


def _decode(encoded: bytes, as_type: type[T], digest: Digest) -> T:
    try:
        return msgspec.json.decode(encoded, type=prepared(as_type))
    except (ValueError, RecursionError) as error:  # msgspec's, and its UnicodeDecodeError
        raise Damaged(
            f"manifest of snapshot {digest[:12]} cannot be read", reason=str(error)
        ) from None


def find_problem(manifest: Manifest) -> str:
    """The first way in which a manifest contradicts itself, or an empty string."""
    if manifest.format != FORMAT:
        return f"format {manifest.format} never was"
    for name, value, least, most in _numbers(manifest):
        if not least <= value <= most:
            return f"{name} of {value}"
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
    if (manifest.kind == "base") != (manifest.function is None):
        return f"kind {manifest.kind} and its function entry do not fit"
    try:
        for digest in _digests(manifest):
            parse_digest(digest)
        if manifest.function is not None:
            parse_name(manifest.function.name, what="function name")
    except InvalidInput as error:
        return str(error)
    return ""


def _numbers(manifest: Manifest) -> Iterator[tuple[str, int, int, int]]:
    machine, function = manifest.machine, manifest.function
    yield "a vmstate", manifest.vmstate.size_bytes, 1, LARGEST_VMSTATE_BYTES
    yield "an app capacity", machine.app_bytes, 0, _LARGEST
    yield "a number of CPUs", machine.vcpus, 1, _MOST_CPUS
    yield "a page size", manifest.platform.page_bytes, 1, _LARGEST
    yield "a time", manifest.created_ns, 0, _LARGEST
    if function is not None:
        yield "a revision", function.revision, 0, _LARGEST
        yield "a port", function.port, 1, (1 << 16) - 1
        yield "a count of refreshes", function.refreshed, 0, _LARGEST
        if function.scale is not None:
            for name, (least, most) in SCALE_LIMITS.items():
                yield f"a scale's {name}", getattr(function.scale, name), least, most
            yield "a scale's max", function.scale.max, function.scale.min, _LARGEST


def _digests(manifest: Manifest) -> Iterator[Digest]:
    yield from (manifest.image, manifest.platform.kernel)
    yield from (manifest.memory.digest, manifest.disk.digest, manifest.vmstate.digest)
    if manifest.parent is not None:
        yield manifest.parent
    if manifest.function is not None:
        yield manifest.function.app
