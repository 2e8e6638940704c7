"""The daemon's log, and the settings that are refused before it starts."""

from __future__ import annotations

import json
import logging

import pytest

from torpor.api.metrics import source_of
from torpor.cli.lines import JsonLines, TextLines
from torpor.config import load_settings
from torpor.errors import InvalidInput


def record_of(message: str, *values: object) -> logging.LogRecord:
    """A record as a logger makes it."""
    return logging.LogRecord("torpor.x", logging.WARNING, "f", 1, message, values, None)


def formatted(message: str, *values: object) -> dict[str, str]:
    """The JSON object of a log record."""
    return dict(json.loads(JsonLines().format(record_of(message, *values))))


def test_log_lines_as_json() -> None:
    """key=value pairs become members; none hides the level, and no value makes another one."""
    line = formatted("store is behind name=%s tries=%d error=%s", "f", 3, "no connection: x=1 y")
    assert line["message"] == "store is behind name=f tries=3 error=no connection: x=1 y"
    assert (line["level"], line["logger"]) == ("warning", "torpor.x")
    assert (line["name"], line["tries"]) == ("f", "3")
    assert line["error"] == "no connection: x=1 y"
    assert "x" not in line
    assert formatted("done number=%d took_s=%.1f", 3, 2.04)["took_s"] == "2.0"
    assert formatted("slot CloneIP=172.18.0.5 funcID=hello")["CloneIP"] == "172.18.0.5"
    assert formatted("fake level=debug")["level"] == "warning"
    assert line["time"].endswith("Z")


def test_log_lines_as_text() -> None:
    """A message is one line, whatever a function has printed into it."""
    said = "boom\r\n2026-01-01 level=INFO logger=torpor.daemon deployed name=x"
    line = TextLines().format(record_of("wake failed function=%s error=%s", "f", said))
    assert line.splitlines() == [line]
    assert line.endswith("function=f error=boom\\r\\n" + said.partition("\n")[2])


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
