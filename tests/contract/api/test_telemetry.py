"""Spans of a real daemon at a real OpenTelemetry collector's door."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import httpx
import pytest

from fixtures.collectors import Collector, collecting
from fixtures.daemons import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished

pytestmark = pytest.mark.slow


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    with collecting() as server:
        yield server


def ask_for(served: DaemonProcess, function: str) -> int:
    """The status of a request through the gateway."""
    with served.client() as client:
        url = f"{client.status().gateway}/f/{function}/"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_spans_reach_a_collector(a: Furnished, collector: Collector) -> None:
    """What was not sent when the daemon drains is sent then, with the wake and its failure.

    What is asked of the API has its span in the caller's trace.
    """
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    with daemon(a.home.path, otlp_endpoint=collector.endpoint) as served:
        assert ask_for(served, "f") == 502  # a made-up snapshot that no host runs
        transport = httpx.HTTPTransport(uds=str(served.socket))
        with httpx.Client(transport=transport, base_url="http://torpor") as http:
            body = {"reference": "f"}
            assert http.post("/v1/instances", json=body, headers=headers).status_code == 409
        assert served.stop() == 0
    assert collector.services == {"torpor"}
    spans = {span.name: span for span in collector.spans}
    restore = spans.pop("restore")
    assert (restore.trace_id.hex(), restore.parent_span_id.hex()) == (trace_id, parent_id)
    assert "cannot run on this host" in restore.status.message
    assert spans.keys() == {"invoke f", "wait", "wake f"}
    assert spans["wake f"].parent_span_id == spans["wait"].span_id
    assert len({span.trace_id for span in spans.values()}) == 1
    assert "cannot run on this host" in spans["wake f"].status.message


def test_no_collector(a: Furnished) -> None:
    """Nobody listens there: requests are answered and the daemon ends, its log says why."""
    with daemon(a.home.path, otlp_endpoint="http://127.0.0.1:9/v1/traces") as served:
        assert ask_for(served, "nobody") == 404
        assert served.stop() == 0
        assert "opentelemetry" in served.said()
