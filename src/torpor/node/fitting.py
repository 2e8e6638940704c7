"""Whether a snapshot can run on this host: asked before anything is made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.errors import Incompatible

if TYPE_CHECKING:
    from torpor.node.paging import Paging
    from torpor.node.parts import Parts
    from torpor.snapshot.local import LocalSnapshot


def check_fits(parts: Parts, paging: Paging, snapshot: LocalSnapshot) -> None:
    """Refuse a snapshot that this host cannot run. Blocking. Raises Incompatible."""
    manifest = snapshot.manifest
    here = parts.driver_of(manifest).platform(parts.boot_files().kernel_digest)
    differences = manifest.platform.differences(here)
    wanted = {"image": manifest.image}
    if manifest.function is not None:
        wanted["app"] = manifest.function.app
    for what, digest in wanted.items():
        if not paging.has_image(digest):
            differences.append(f"{what} {digest[:12]} is not on this node")
    if differences:
        hint = "restore it on a host like the one that made it, or deploy the function here"
        if manifest.platform.vmm != here.vmm:
            hint = f"a host with that VMM wakes it with --vmm {manifest.platform.vmm} or auto"
        raise Incompatible(
            f"snapshot {snapshot.digest[:12]} cannot run on this host",
            reason="; ".join(differences),
            hint=hint,
        )
