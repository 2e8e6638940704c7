"""A restore taken apart: as tables, or drawn into a PNG file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer

from torpor.cli.output import print_table
from torpor.errors import HostUnfit, InvalidInput
from torpor.node.trace import CLASSES
from torpor.units import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from torpor.node.timeline import Step
    from torpor.node.trace import Paged, Trace

_BAR_WIDTH: Final = 48

TraceOption = Annotated[
    bool, typer.Option("--trace", help="Show when each step ran and what was paged from where.")
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="Draw the trace into a file; needs matplotlib."),
]


def show_trace(trace: Trace, *, to: TextIO | None = None) -> None:
    """Print steps with a bar each, then windows by class, on standard output or elsewhere."""
    stream = to or sys.stdout
    stream.write("\n")
    end_s = end_of(trace)
    rows = [
        (
            f"{'  ' * depth}{step.name}",
            format_duration(step.begin_s),
            format_duration(step.duration_s) + ("" if step.ended else ", goes on"),
            bar(step, end_s),
        )
        for depth, step in nested(trace.steps)
    ]
    rows.append(("ready", format_duration(trace.ready_s), "", ""))
    print_table(("STEP", "BEGIN", "TOOK", ""), rows, empty="", to=stream)
    if trace.paged is not None:
        _show_paged(trace.paged, stream)


def nested(steps: Sequence[Step]) -> list[tuple[int, Step]]:
    """Steps with their depth, each followed by its parts; in one depth by their begin.

    Of a step that was done in several pieces the first one is followed by the parts.
    """
    names = {step.name for step in steps}
    ordered = sorted(steps, key=lambda step: step.begin_s)

    def below(name: str, depth: int) -> list[tuple[int, Step]]:
        found: list[tuple[int, Step]] = []
        for step in ordered:
            if (step.part_of if step.part_of in names else "") == name:
                first = step.name not in {other.name for _, other in found}
                found += [(depth, step), *(below(step.name, depth + 1) if first else [])]
        return found

    return below("", 0)


def end_of(trace: Trace) -> float:
    """The end of all that was traced, in seconds from its beginning."""
    return max([trace.ready_s, *(step.begin_s + step.duration_s for step in trace.steps)])


def bar(step: Step, end_s: float) -> str:
    """A step as a line of blocks where it ran between 0 and `end_s`; never an empty one."""
    scale = _BAR_WIDTH / end_s
    begin = min(int(step.begin_s * scale), _BAR_WIDTH - 1)
    return " " * begin + "█" * max(1, round((step.begin_s + step.duration_s) * scale) - begin)


def check_plot(path: Path | None) -> None:
    """Refuse before any work what could not be drawn after it. Raises InvalidInput, HostUnfit."""
    if path is None:
        return
    if path.suffix != ".png" or not path.parent.is_dir():
        raise InvalidInput(
            f"cannot draw into {path}", hint="name a .png file in a directory that is there"
        )
    _figure()


def draw(trace: Trace | None, path: Path | None, *, title: str) -> None:
    """Draw a trace: steps above each other, and the stalls by class. Raises InvalidInput."""
    if trace is None or path is None:
        return
    figure_of = _figure()
    rows = nested(trace.steps)
    figure = figure_of(figsize=(10, 2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for number, (depth, step) in enumerate(rows):
        colour = f"C{0 if not step.part_of else 1 + depth}"
        axes.barh(number, step.duration_s * 1000, left=step.begin_s * 1000, color=colour)
    axes.set_yticks(range(len(rows)), [f"{'  ' * depth}{step.name}" for depth, step in rows])
    axes.invert_yaxis()
    axes.axvline(trace.ready_s * 1000, color="black", linestyle="--", label="ready")
    axes.set_xlim(left=0)
    axes.set_xlabel("ms since the beginning")
    axes.set_title(title if trace.paged is None else f"{title}\n{_in_words(trace.paged)}")
    axes.legend(loc="lower left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InvalidInput(f"cannot draw into {path}", reason=str(error)) from None


def _show_paged(paged: Paged, stream: TextIO) -> None:
    rows = [
        (
            CLASSES[name],
            counted.windows,
            "-" if name == "pushed" else format_duration(counted.stalled_s),
        )
        for name, counted in paged.classes.items()
    ]
    stream.write("\n")
    print_table(("WINDOWS", "COUNT", "STALLED"), rows, empty="", to=stream)
    stream.write(f"\nfetched {format_size(paged.fetched_bytes)} in {paged.requests} requests\n")
    if paged.hydrated_bytes:
        stream.write(f"of it hydrated {format_size(paged.hydrated_bytes)} so far\n")
    if paged.push_failure:
        stream.write(f"the push failed: {paged.push_failure}\n")


def _in_words(paged: Paged) -> str:
    windows = ", ".join(f"{CLASSES[name]} {c.windows}" for name, c in paged.classes.items())
    stalled_s = sum(counted.stalled_s for counted in paged.classes.values())
    return (
        f"windows: {windows}; stalled {format_duration(stalled_s)};"
        f" {format_size(paged.fetched_bytes)} in {paged.requests} requests"
    )


def _figure() -> type[Figure]:
    """matplotlib's figure, which needs no display. Raises HostUnfit."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HostUnfit(
            "--plot needs matplotlib", reason=str(error), hint="pip install 'torpor[plot]'"
        ) from None
    return Figure
