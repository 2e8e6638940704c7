"""How a trace is printed and drawn."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from torpor.cli.trace import bar, check_plot, draw, nested, show_trace
from torpor.errors import InvalidInput
from torpor.node.timeline import Step
from torpor.node.trace import Paged, Trace, Windows

TORPOR = Path(sys.executable).with_name("torpor")

STEPS = (
    Step("open", 0.0, 0.2),
    Step("resolve", 0.01, 0.05, "open"),
    Step("manifest", 0.06, 0.1, "open"),
    Step("slot", 0.2, 0.1),
    Step("push", 0.1, 0.4, "pager"),
    Step("first window", 0.1, 0.1, "push"),
    Step("hydration", 0.5, 0.3, "pager", ended=False),
)
PAGED = Paged(
    {
        "pushed": Windows(1200, 0.0),
        "zero": Windows(7, 0.001),
        "cache": Windows(30, 0.002),
        "store": Windows(4, 0.5),
    },
    fetched_bytes=3 << 20,
    requests=11,
    push_failure="",
    hydrated_bytes=1 << 20,
)
TRACE = Trace(STEPS, 0.5, PAGED)


def printed(trace: Trace) -> str:
    """What people see."""
    stream = io.StringIO()
    show_trace(trace, to=stream)
    return stream.getvalue()


def test_parts_stand_below_their_step() -> None:
    """Steps by begin, each with its parts after it; a part of nothing here is no one's.

    Parts of a step that went on later stand below its beginning alone.
    """
    assert [(depth, step.name) for depth, step in nested(STEPS)] == [
        (0, "open"),
        (1, "resolve"),
        (1, "manifest"),
        (0, "push"),
        (1, "first window"),
        (0, "slot"),
        (0, "hydration"),
    ]
    again = [step.name for _, step in nested((*STEPS, Step("open", 0.4, 0.1)))]
    assert (again.count("open"), again.count("resolve")) == (2, 1)


def test_bars_lie_where_steps_ran() -> None:
    """A bar spans its step on the scale of the whole; the shortest step is seen, the last too."""
    assert bar(Step("all", 0.0, 2.0), 2.0) == "█" * 48
    assert bar(Step("half", 1.0, 1.0), 2.0) == " " * 24 + "█" * 24
    assert bar(Step("instant", 2.0, 0.0), 2.0) == " " * 47 + "█"


def test_table_has_steps_and_windows() -> None:
    """Each step with begin and duration, each class with windows and stalls, and the requests."""
    lines = [line.split() for line in printed(TRACE).splitlines()]
    assert ["slot", "200", "ms", "100", "ms"] in [line[:5] for line in lines]
    assert any(line[:1] == ["hydration"] and "goes" in line for line in lines)
    assert ["ready", "500", "ms"] in lines
    assert ["pushed", "1200", "-"] in lines
    assert ["bucket", "4", "500", "ms"] in lines
    assert ["chunk", "cache", "30", "2", "ms"] in [line[:5] for line in lines]
    assert "fetched 3.0 MiB in 11 requests" in printed(TRACE)
    assert "hydrated 1.0 MiB" in printed(TRACE)


def test_local_restore_has_no_windows() -> None:
    """A snapshot that is on the node shows its own steps, and nothing of a pager."""
    text = printed(Trace(STEPS[3:4], 0.3, None))
    assert "slot" in text
    assert "WINDOWS" not in text
    assert "fetched" not in text


def test_plot_is_a_picture(tmp_path: Path) -> None:
    """--plot writes a PNG without a display, for a paged restore and for a local one."""
    for number, trace in enumerate((TRACE, Trace(STEPS[3:4], 0.3, None))):
        path = tmp_path / f"{number}.png"
        check_plot(path)
        draw(trace, path, title="restore hello")
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert path.stat().st_size > 5000


@pytest.mark.parametrize("name", ["trace.svg", "no-such-directory/trace.png"])
def test_what_cannot_be_drawn_is_refused_first(tmp_path: Path, name: str) -> None:
    """A plot that could not be written is refused before anything is woken."""
    with pytest.raises(InvalidInput, match="cannot draw into"):
        check_plot(tmp_path / name)
    command = [TORPOR, "restore", "hello", "--plot", tmp_path / name, "--home", tmp_path / "home"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == InvalidInput.exit_code
    assert answer.stderr.startswith("error: cannot draw into")
    assert not (tmp_path / "home").exists()
