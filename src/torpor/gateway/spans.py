"""OpenTelemetry spans of requests and wakes; without a tracer none are made.

    invoke NAME             from the request's head to the end of its response
    ├── wait                until an instance takes a connection; not there when one was kept
    │   └── wake NAME       of the wake that this request began; others that wait have none
    │       └── its steps   as `torpor invoke --trace` names them
    └── first byte          from the head that the function gets to the head of its response

A request that brings a sampled trace context continues it; one whose context says that it is not
sampled has no spans.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind, use_span

from torpor.node.spans import CONTEXT_HEADERS, add_span, add_steps, context_of, epoch_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.trace import Span, Tracer

    from torpor.gateway.client import Incoming
    from torpor.gateway.exchange import Exchange
    from torpor.gateway.fleet import Woken


class Spans:
    """Makes spans with a tracer. Moments are CLOCK_MONOTONIC, as the loop's."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer

    @contextlib.contextmanager
    def request(self, incoming: Incoming) -> Iterator[Span | None]:
        """The span of a request, current during the body; None when it has none."""
        if self._tracer is None:
            yield None
            return
        head = incoming.head
        given = {
            name: value.decode("latin-1")
            for name in CONTEXT_HEADERS
            if (value := head.get(name.encode())) is not None
        }
        method = head.method.decode("latin-1")
        span = self._tracer.start_span(
            f"invoke {method}",
            context=context_of(given),
            kind=SpanKind.SERVER,
            start_time=epoch_ns(incoming.at),
            attributes={
                "http.request.method": method,
                "torpor.request_id": head.request_id.decode("ascii"),
            },
        )
        with use_span(span, end_on_exit=True, record_exception=False):
            yield span if span.is_recording() else None

    @contextlib.contextmanager
    def wait(self, began: float) -> Iterator[None]:
        """Time the body from `began`, as a part of the current request."""
        if self._tracer is None:
            yield
            return
        span = self._tracer.start_span("wait", start_time=epoch_ns(began))
        with use_span(span, end_on_exit=True, record_exception=False):
            yield

    @contextlib.contextmanager
    def wake(self, function: str, queued_at: float) -> Iterator[Span | None]:
        """The span of a wake; say with `woke` or `failed` what came of it."""
        if self._tracer is None:
            yield None
            return
        span = self._tracer.start_span(
            f"wake {function}",
            start_time=epoch_ns(queued_at),
            attributes={"faas.invoked_name": function},
        )
        with use_span(span, end_on_exit=True, record_exception=False):
            yield span

    def woke(self, span: Span | None, woken: Woken) -> None:
        """A wake gave an instance: the steps of its timeline become spans."""
        if span is None or self._tracer is None:
            return
        span.set_attribute("torpor.source", woken.how)
        span.set_attribute("torpor.instance", woken.ready.id)
        if woken.timeline is not None:
            add_steps(self._tracer, span, woken.timeline)

    def first_byte(self, span: Span | None, exchange: Exchange, sent_at: float) -> None:
        """A function's response began, if it did."""
        if span is None or self._tracer is None:
            return
        if exchange.head_at:
            answered(span, exchange.status)
            add_span(
                self._tracer,
                "first byte",
                sent_at,
                exchange.head_at,
                parent=span,
                kind=SpanKind.CLIENT,
            )


def name_request(span: Span | None, function: str) -> None:
    """The function that a request means is known."""
    if span is not None:
        span.update_name(f"invoke {function}")
        span.set_attribute("faas.invoked_name", function)


def answered(span: Span | None, status: int) -> None:
    """The status that the client sees."""
    if span is not None:
        span.set_attribute("http.response.status_code", status)


def traceparent(span: Span | None) -> bytes | None:
    """The trace context that goes on to the function in place of the client's."""
    if span is None:
        return None
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01".encode()
