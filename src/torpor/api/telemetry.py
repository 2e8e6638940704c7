"""The export of spans to an OpenTelemetry collector, over OTLP/HTTP."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer

from torpor import __version__

_EXPORT_S: Final = 5.0


@contextlib.contextmanager
def exporting(endpoint: str) -> Iterator[Tracer]:
    """A tracer whose spans go to a collector, in batches, from a thread of their own.

    What is not sent when the body ends is sent then. A collector that does not answer costs the
    spans, a few seconds at the end and a line in the log, nothing else.
    """
    resource = Resource.create(
        {
            "service.name": "torpor",
            "service.version": __version__,
            "host.name": socket.gethostname(),
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider.get_tracer("torpor", __version__)
    finally:
        provider.shutdown()
