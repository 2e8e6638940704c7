"""OpenTelemetry spans of what is asked of the API and makes something; without a tracer none.

    restore                 the operation, by its name: from request to answer
    └── wake NAME           of each instance that was woken for it
        └── its steps       as `torpor invoke --trace` names them

A request that brings a trace context continues it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from opentelemetry.trace import SpanKind, Tracer, use_span

from torpor.errors import TorporError
from torpor.node.spans import CONTEXT_HEADERS, add_steps, context_of, epoch_ns, failed
from torpor.node.timeline import Timeline

Woke = Callable[[str, str, Timeline], None]
"""An instance was woken: its function, its id, and where the time went."""


@contextlib.contextmanager
def operation(tracer: Tracer | None, name: str, headers: Mapping[str, str]) -> Iterator[Woke]:
    """The span of an operation, current during the body, which says what it wakes."""
    if tracer is None:
        yield lambda function, instance, timeline: None
        return
    given = {name: headers[name] for name in CONTEXT_HEADERS if name in headers}
    span = tracer.start_span(name, context=context_of(given), kind=SpanKind.SERVER)
    known: Tracer = tracer

    def woke(function: str, instance: str, timeline: Timeline) -> None:
        made = known.start_span(
            f"wake {function}",
            start_time=epoch_ns(timeline.origin_s),
            attributes={"faas.invoked_name": function, "torpor.instance": instance},
        )
        add_steps(known, made, timeline)
        ends = (step.begin_s + step.duration_s for step in timeline.steps)
        made.end(epoch_ns(timeline.origin_s + max(ends, default=0.0)))

    with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield woke
        except TorporError as error:
            failed(span, error)
            raise
