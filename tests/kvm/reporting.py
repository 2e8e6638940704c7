"""Inside level 1: pytest's reports as lines of JSON on the report port, as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

PORT = Path("/dev/rig-report")


class _Sender:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._port = PORT.open("w")

    def send(self, **message: object) -> None:
        self._port.write(json.dumps(message) + "\n")
        self._port.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.send(begins=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data: dict[str, Any] = self._config.hook.pytest_report_to_serializable(
            config=self._config, report=report
        )
        self.send(report=data)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.send(problem=report.longreprtext)


def pytest_configure(config: pytest.Config) -> None:
    """Send to level 0."""
    config.pluginmanager.register(_Sender(config), "kvm-sender")
