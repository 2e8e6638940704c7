"""Spans of a real daemon at a real OpenTelemetry collector's door."""

from __future__ import annotations

import gzip
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from fixtures.daemons import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished

pytestmark = pytest.mark.slow


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it gets over OTLP/HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.services: set[str] = set()

    @property
    def endpoint(self) -> str:
        """Its URL for traces."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services |= {
                a.value.string_value for a in one.resource.attributes if a.key == "service.name"
            }
            self.server.spans += [span for scope in one.scope_spans for span in scope.spans]
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that listens."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


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


def test_spans_reach_a_collector(a: Furnished, collector: Collector, tmp_path: Path) -> None:
    """What was not sent when the daemon drains is sent then, with the wake and its failure."""
    with daemon(a.home.path, otlp_endpoint=collector.endpoint) as served:
        assert ask_for(served, "f") == 502  # a made-up snapshot that no host runs
        assert served.stop() == 0
    assert collector.services == {"torpor"}
    spans = {span.name: span for span in collector.spans}
    assert spans.keys() == {"invoke f", "wait", "wake f"}
    assert spans["wake f"].parent_span_id == spans["wait"].span_id
    assert len({span.trace_id for span in collector.spans}) == 1
    assert "cannot run on this host" in spans["wake f"].status.message


def test_no_collector(a: Furnished) -> None:
    """Nobody listens there: requests are answered and the daemon ends, its log says why."""
    with daemon(a.home.path, otlp_endpoint="http://127.0.0.1:9/v1/traces") as served:
        assert ask_for(served, "nobody") == 404
        assert served.stop() == 0
        assert "opentelemetry" in served.said()
