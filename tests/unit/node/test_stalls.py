"""Which instances may stand still is told by the processor time that their VMMs do not use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torpor.host.process import ProcessId
from torpor.node.journal_rows import InstanceRow
from torpor.node.stalls import Suspects

if TYPE_CHECKING:
    import pytest

ME = ProcessId(1, 1)


def row_of(number: int) -> InstanceRow:
    """A running instance."""
    return InstanceRow(
        id=f"i-{number}",
        function="f",
        snapshot="",
        state="running",
        owner=ME,
        vmm=ProcessId(number, 1),
        slot=number,
        address="",
        port=1,
        created_ns=0,
        keeper=None,
        capturer=None,
        booted=False,
    )


def test_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose time stands still, each once for that, a few at a look; not what is captured."""
    ticks = dict.fromkeys(range(1, 9), 10)
    monkeypatch.setattr(ProcessId, "cpu_ticks", lambda process: ticks[process.pid])
    rows = [row_of(number) for number in ticks]
    rows[7] = replace(rows[7], capturer=ME)
    suspects = Suspects()

    def found() -> list[str]:
        return [row.id for row in suspects.find(rows)]

    assert found() == []
    assert found() == ["i-1", "i-2", "i-3", "i-4"]
    ticks[6] += 1
    assert found() == ["i-5", "i-7"]
    assert found() == ["i-6"]
    assert found() == []
    suspects.forget(["i-2"])
    ticks[3] += 1
    assert found() == ["i-2"]
    assert found() == ["i-3"]
