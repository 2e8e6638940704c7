"""A function's snapshot replaced by one of its running instance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from torpor.errors import Conflict
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.host.lock import exclusive
from torpor.node.capture import Captured, capture
from torpor.node.tables import Recipes
from torpor.vmm.interface import finish

if TYPE_CHECKING:
    from torpor.node.instance import Instances
    from torpor.node.paging import Paging
    from torpor.node.parts import Parts


async def refresh_function(
    parts: Parts, instances: Instances, paging: Paging, instance_id: str
) -> Captured:
    """Snapshot an instance, which runs on, and point its function's name to that snapshot.

    Raises Conflict when the name means another snapshot by now than the one that the instance was
    woken from (somebody deployed meanwhile, or removed it), or while somebody deploys; then as
    `capture` does. The name is changed last.
    """
    row = parts.journal.instance(instance_id)
    name = row.function
    async with (
        entered_in_thread(
            exclusive(parts.locks_dir / f"function-{name}", timeout_s=0, what=f"function {name}")
        ),
        entered_in_thread(parts.files_lock()),
    ):
        _require_current(parts, name, row.snapshot)
        parts.journal.claim_capture(row.id)
        try:
            instance = await instances.adopt(row)
            try:
                assert instance.function is not None
                function = msgspec.structs.replace(
                    instance.function, refreshed=instance.function.refreshed + 1
                )
                async with entered_in_thread(paging.copied(instance.parent)):
                    captured = await capture(
                        parts, instance, kind="function", function=function, then="resume"
                    )
                    await in_thread(paging.keep_images, captured.snapshot)
            finally:
                await finish(instance.vmm.detach())
        finally:
            parts.journal.end_capture(row.id)
        recipes, digest = Recipes(parts.journal), captured.snapshot.digest
        recipe = await in_thread(recipes.get, row.snapshot)
        kept = None if recipe is None else recipes.keeping(digest, recipe)
        await in_thread(parts.journal.set_ref, name, digest, along=kept)
    return captured


def _require_current(parts: Parts, name: str, snapshot: str) -> None:
    ref = parts.journal.ref(name)
    if ref is None or ref.digest != snapshot:
        raise Conflict(
            f"{name!r} means another snapshot by now", hint="the instance is of an older revision"
        )
