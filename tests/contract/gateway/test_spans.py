"""OpenTelemetry spans of requests and wakes, by the SDK itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from fixtures.gateways import TestFleet, connected, fields_of, serving, wait_for
from torpor.config import Settings
from torpor.errors import VmmFailed
from torpor.gateway import Gateway
from torpor.gateway.fleet import Woken
from torpor.node.timeline import Timeline
from torpor.snapshot.manifest import Scale

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from opentelemetry.sdk.trace import ReadableSpan

GET = b"GET /f/%b/ HTTP/1.1\r\nHost: x\r\n%b\r\n"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


class TimedFleet(TestFleet):
    """A fleet whose wakes have a timeline: two steps, and a part of the second."""

    async def wake(self, name: str) -> Woken:
        """See Fleet."""
        timeline = Timeline()
        woken = await super().wake(name)
        with timeline.step("slot"):
            pass
        with timeline.step("load"):
            part_began = timeline.origin_s + timeline.elapsed_s()
        timeline.add_part("fetch", part_began, part_began + 0.001, of="load")
        return Woken(woken.ready, "store", timeline)


@dataclass
class Traced:
    """A traced gateway over a sleeping function, and what it has exported."""

    fleet: TimedFleet
    exporter: InMemorySpanExporter
    heads: list[bytes]
    spans: dict[str, ReadableSpan] = field(default_factory=dict)

    async def ask(self, function: bytes = b"hello", head: bytes = b"") -> int:
        """One request on its own connection; the spans that it made, by name."""
        self.exporter.clear()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        gateway = Gateway(self.fleet, Settings(), tracer=provider.get_tracer("tests"))
        await gateway.start(host="127.0.0.1", port=0)
        try:
            async with connected(gateway) as client:
                client.send(GET % (function, head))
                status, _, _ = await client.answer()
            await wait_for(lambda: not gateway.connections)
        finally:
            await gateway.drain(deadline_s=0.1)
        self.spans = {span.name: span for span in self.exporter.get_finished_spans()}
        return status

    def parent_of(self, name: str) -> str:
        """The name of a span's parent; its id if it is none of ours; empty without one."""
        parent = self.spans[name].parent
        if parent is None:
            return ""
        ours = {s.context.span_id: s.name for s in self.spans.values() if s.context}
        return ours.get(parent.span_id, f"{parent.span_id:016x}")


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    """A function that sleeps behind a traced gateway."""
    async with serving() as function:
        fleet = TimedFleet()
        fleet.deploy("hello", function.port, Scale())
        yield Traced(fleet, InMemorySpanExporter(), function.heads)


async def test_cold_start_from_request_to_first_byte(traced: Traced) -> None:
    """The request continues the client's trace; the wake and its steps are parts of its wait."""
    given = b"traceparent: 00-%b-%b-01\r\ntracestate: a=b\r\n" % (
        TRACE_ID.encode(),
        PARENT_ID.encode(),
    )
    assert await traced.ask(head=given) == 200
    assert {name: traced.parent_of(name) for name in traced.spans} == {
        "invoke hello": PARENT_ID,
        "wait": "invoke hello",
        "wake hello": "wait",
        "slot": "wake hello",
        "load": "wake hello",
        "fetch": "load",
        "first byte": "invoke hello",
    }
    request, wake = traced.spans["invoke hello"], traced.spans["wake hello"]
    assert request.kind is SpanKind.SERVER
    assert request.context is not None
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 200
    assert wake.attributes is not None
    assert wake.attributes["torpor.source"] == "store"
    assert wake.attributes["torpor.instance"] == "hello-1"
    for name, span in traced.spans.items():
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time, name
    upstream = fields_of(traced.heads[0])
    assert upstream["traceparent"] == f"00-{TRACE_ID}-{request.context.span_id:016x}-01"
    assert upstream["tracestate"] == "a=b"


async def test_warm_request_without_a_context(traced: Traced) -> None:
    """It begins a trace, which the function sees; nothing was woken."""
    await traced.ask()
    assert await traced.ask() == 200
    assert {name: traced.parent_of(name) for name in traced.spans} == {
        "invoke hello": "",
        "wait": "invoke hello",
        "first byte": "invoke hello",
    }
    context = traced.spans["invoke hello"].context
    assert context is not None
    sent = fields_of(traced.heads[-1])["traceparent"]
    assert sent == f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


async def test_client_that_does_not_sample(traced: Traced) -> None:
    """Its context goes on as it is, and there are no spans, of the wake neither."""
    given = f"00-{TRACE_ID}-{PARENT_ID}-00"
    assert await traced.ask(head=b"traceparent: %b\r\n" % given.encode()) == 200
    assert traced.spans == {}
    assert fields_of(traced.heads[0])["traceparent"] == given


async def test_failures_are_told(traced: Traced) -> None:
    """A wake that fails and its request end as errors; an unknown function is the client's."""
    traced.fleet.errors.append(VmmFailed("the VM did not start"))
    assert await traced.ask() == 503
    wake, request = traced.spans["wake hello"], traced.spans["invoke hello"]
    assert not wake.status.is_ok
    assert wake.status.description == "the VM did not start"
    assert wake.attributes is not None
    assert wake.attributes["error.type"] == "VmmFailed"
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 503
    assert "first byte" not in traced.spans
    assert await traced.ask(b"nobody") == 404
    (unknown,) = traced.spans.values()
    assert unknown.attributes is not None
    assert unknown.attributes["http.response.status_code"] == 404
