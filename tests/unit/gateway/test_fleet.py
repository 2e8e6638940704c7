"""What a gateway sees of its node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torpor.config import Settings
from torpor.gateway.fleet import NodeFleet
from torpor.node.node import Node
from torpor.units import Digest

if TYPE_CHECKING:
    from pathlib import Path


async def test_changes_that_follow_a_look_closely(tmp_path: Path) -> None:
    """Each write to the journal is one, also in the same tick of the file system's clock."""
    settings = Settings(home=tmp_path / "home", runtime_dir=tmp_path / "run")
    async with Node.open(settings) as node:
        fleet, path = NodeFleet(node), settings.home / "journal.sqlite"
        await fleet.view()
        before = path.stat()
        assert not fleet.changed()
        node.parts.journal.set_ref("f", Digest("0" * 64))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert fleet.changed()
        await fleet.view()
        assert not fleet.changed()
