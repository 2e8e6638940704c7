"""What `snapshot inspect` and `snapshot verify` show of a snapshot in the store."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from torpor.cli.context import options
from torpor.cli.output import print_json, print_table
from torpor.errors import Damaged, NotFound
from torpor.snapshot.repository.check import Checked, check
from torpor.snapshot.repository.describing import key_name
from torpor.units import Digest, format_size

if TYPE_CHECKING:
    from torpor.snapshot.repository.describing import Description
    from torpor.snapshot.repository.repository import Repository
    from torpor.snapshot.transfer import Progress


@dataclass(frozen=True)
class Verified:
    """A name in the store whose every byte was read; `key_id` is empty for a plain one."""

    name: str
    digest: Digest
    key_id: str
    checked: Checked


def verify_stored(repository: Repository, name: str, progress: Progress) -> Verified:
    """Read and open all that a name in the store needs.

    Raises NotFound, KeyMissing, and Damaged with every problem in its reason.
    """
    ref = repository.read_ref(name)
    if ref is None:
        raise NotFound(f"there is no {name!r} in the store", hint="`torpor store ls` lists names")
    checked = check(repository, progress=progress, read_data=True, refs=[name])
    if checked.problems:
        raise Damaged(
            f"{name} in the store is damaged",
            reason="\n".join(f"{found.key}: {found.reason}" for found in checked.problems),
            hint="push it again from a node that has it",
        )
    return Verified(name, ref.record.snapshot, key_name(ref.domain), checked)


def show_verified(verified: Verified) -> None:
    """Print that a name is sound."""
    checked = verified.checked
    if options.as_json:
        print_json(
            {
                "name": verified.name,
                "snapshot": verified.digest,
                "key": verified.key_id or None,
                **msgspec.to_builtins(checked),
            }
        )
        return
    sys.stdout.write(f"{verified.digest}\n")
    sealed = f"sealed with key {verified.key_id}" if verified.key_id else "PLAIN"
    sys.stderr.write(f"{checked.chunks} chunks, {format_size(checked.read_bytes)}: {sealed}\n")


def show_description(found: Description) -> None:
    """Print what the store has of a snapshot."""
    manifest = found.manifest
    function = manifest.function
    if options.as_json:
        print_json(
            {
                "snapshot": found.digest,
                "name": found.name,
                "updated_ns": found.updated_ns,
                "key": found.key_id or None,
                "plain": not found.key_id,
                "kind": manifest.kind,
                "function": function.name if function else None,
                "parent": manifest.parent,
                "base": found.base,
                "files": msgspec.to_builtins(found.files),
                "wake_bytes": found.wake_bytes,
                "record_bytes": found.record_bytes,
                "packs": found.packs,
                "manifest": msgspec.to_builtins(manifest),
            }
        )
        return
    rows = [
        ("snapshot", found.digest),
        ("sealed", f"with key {found.key_id}" if found.key_id else "no, PLAIN: anybody reads it"),
        ("kind", manifest.kind),
        ("function", f"{function.name}, revision {function.revision}" if function else "-"),
        ("parent", manifest.parent or "-"),
        ("base in the store", found.base or "-"),
        ("wake object", format_size(found.wake_bytes)),
        ("record", format_size(found.record_bytes)),
        ("packs", found.packs),
    ]
    print_table(("", ""), rows, empty="")
    sys.stdout.write("\n")
    files = [
        (
            file.name,
            format_size(file.size_bytes),
            format_size(file.content_bytes),
            format_size(file.stored_bytes),
            format_size(file.shared_bytes),
        )
        for file in found.files
    ]
    print_table(("FILE", "LENGTH", "NOT ZERO", "STORED", "OF THAT IN BASE"), files, empty="")
