"""The daemon's log, and the settings that are refused before it starts."""

from __future__ import annotations

import json
import logging

import pytest

from torpor.api.metrics import source_of
from torpor.cli.serve import _JsonLines
from torpor.config import load_settings
from torpor.errors import InvalidInput


def formatted(message: str, *values: object) -> dict[str, str]:
    """The JSON object of a log record."""
    record = logging.LogRecord("torpor.x", logging.WARNING, "f", 1, message, values, None)
    return dict(json.loads(_JsonLines().format(record)))


def test_log_lines_as_json() -> None:
    """key=value pairs become members, with spaces in the last of them; none hides the level."""
    line = formatted("store is behind name=%s tries=%d error=%s", "f", 3, "no connection: x=1 y")
    assert line["message"] == "store is behind name=f tries=3 error=no connection: x=1 y"
    assert (line["level"], line["logger"]) == ("warning", "torpor.x")
    assert (line["name"], line["tries"]) == ("f", "3")
    assert line["error"].startswith("no connection:")
    assert formatted("fake level=debug")["level"] == "warning"
    assert line["time"].endswith("Z")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_listen", "8080"),
        ("api_listen", ":8080"),
        ("gateway_listen", "localhost:http"),
        ("api_token", "short"),
        ("api_token", "with spaces in it, and long"),
        ("snapshots", "sometimes"),
        ("drain", "no"),
        ("log_format", "xml"),
        ("otlp_endpoint", "localhost:4318"),
    ],
)
def test_settings_that_are_refused(key: str, value: str) -> None:
    """Each mistake names its setting."""
    with pytest.raises(InvalidInput, match=f"TORPOR_{key.upper()}"):
        load_settings(environ={f"TORPOR_{key.upper()}": value})


@pytest.mark.parametrize(
    ("steps", "source"),
    [
        ({"check": 1.0, "slot": 1.0}, "local"),
        ({"pull": 1.0, "slot": 1.0}, "store"),
        ({"open": 1.0, "slot": 1.0}, "store-lazy"),
        ({"boot": 1.0, "function start": 1.0}, "boot"),
    ],
)
def test_classes_of_cold_starts(steps: dict[str, float], source: str) -> None:
    """Where a woken snapshot was follows from the steps of its wake."""
    assert source_of(steps) == source
