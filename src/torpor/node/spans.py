"""Steps of a timeline as OpenTelemetry spans, for who exports them: gateway and API."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import Span, Tracer

    from torpor.errors import TorporError
    from torpor.node.timeline import Timeline

CONTEXT_HEADERS = ("traceparent", "tracestate")
_propagator = TraceContextTextMapPropagator()


def context_of(headers: Mapping[str, str]) -> Context:
    """The trace that a request's headers continue; an empty one without such headers."""
    return _propagator.extract(headers, context=Context())


def add_span(
    tracer: Tracer,
    name: str,
    begin: float,
    end: float,
    *,
    parent: Span,
    kind: SpanKind = SpanKind.INTERNAL,
) -> Span:
    """A span of what is over already, between two moments of CLOCK_MONOTONIC."""
    made = tracer.start_span(
        name, context=set_span_in_context(parent), kind=kind, start_time=epoch_ns(begin)
    )
    made.end(epoch_ns(end))
    return made


def add_steps(tracer: Tracer, parent: Span, timeline: Timeline) -> None:
    """A span for each step of a timeline, and below it those of its parts."""
    parents: dict[str, Span] = {}
    for step in sorted(timeline.steps, key=lambda step: (bool(step.part_of), step.begin_s)):
        begin = timeline.origin_s + step.begin_s
        above = parents.get(step.part_of, parent)
        made = add_span(tracer, step.name, begin, begin + step.duration_s, parent=above)
        if not step.part_of:
            parents[step.name] = made


def failed(span: Span | None, error: TorporError) -> None:
    """What a span is of has failed."""
    if span is not None:
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR, str(error)))


def epoch_ns(moment: float) -> int:
    """A moment of CLOCK_MONOTONIC as one of CLOCK_REALTIME."""
    return time.time_ns() - time.monotonic_ns() + int(moment * 1e9)
