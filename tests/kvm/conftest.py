"""Each test that chosen.toml names becomes one test here, which runs in a level-1 VM."""

from __future__ import annotations

import os
import signal
import tomllib
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from kvm.results import LostResultError
from kvm.session import Group, KvmSession

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

IN_LEVEL_1 = os.environ.get("TORPOR_LEVEL") == "1"
collect_ignore = [] if IN_LEVEL_1 else ["inside"]
_SESSION = pytest.StashKey[KvmSession]()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The list of what runs in level 1."""
    if file_path.name != "chosen.toml" or IN_LEVEL_1:
        return None
    return Chosen.from_parent(parent, path=file_path)  # type: ignore[no-any-return]


class Chosen(pytest.File):
    """chosen.toml: groups of node ids, a VM each."""

    def collect(self) -> Iterator[pytest.Item]:
        """See pytest."""
        for name, table in tomllib.loads(self.path.read_text()).items():
            needs, environment = tuple(table.get("needs", ())), table.get("environment", {})
            group = Group(name, needs, environment).placed()
            for test in table["tests"]:
                yield InLevel1.from_parent(self, name=test, group=group)


class InLevel1(pytest.Item):
    """One test of level 1."""

    def __init__(self, *, group: Group, **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(**keywords)
        self.group = group
        self.reports: list[pytest.TestReport] = []
        self.add_marker(pytest.mark.kvm)
        self.add_marker(pytest.mark.timeout(0))  # the VM has a deadline, and each test in it one

    def setup(self) -> None:
        """Skip what needs a program that is not there."""
        if self.group.lacks:
            pytest.skip(f"{self.group.lacks} names no program")

    def runtest(self) -> None:
        """Wait for the result; the first test starts the VMs, for all that were selected."""
        config = self.config
        if _SESSION not in config.stash:
            groups = defaultdict(list)
            for item in self.session.items:
                if isinstance(item, InLevel1) and not item.group.lacks:
                    groups[item.group].append(item.name)
            config.stash[_SESSION] = KvmSession(groups)
            config.add_cleanup(config.stash[_SESSION].close)
            # so that what it made is removed when `make test` is interrupted, which ends it by this
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        for data in config.stash[_SESSION].wait(self.group, self.name):
            report = config.hook.pytest_report_from_serializable(config=config, data=data)
            self.reports.append(report)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:  # noqa: ANN401
        """A lost result needs no traceback."""
        if isinstance(excinfo.value, LostResultError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """See pytest."""
        return self.path, None, self.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report of a test of level 1 is the one from there: of the phase that failed, if any."""
    own = yield
    if not isinstance(item, InLevel1) or call.when != "call" or not item.reports:
        return own
    by_phase = {report.when: report for report in item.reports}
    failed = [report for report in item.reports if report.failed]
    told = next(iter(failed), None) or by_phase.get("call") or by_phase["setup"]
    told.nodeid, told.location, told.when = item.nodeid, item.location, "call"
    return told


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """What tests of level 1 measured, a line for each; and each VM that had to be started anew."""
    if _SESSION in config.stash:
        for line in config.stash[_SESSION].restarts:
            terminalreporter.write_line(line, yellow=True)
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(f"measured in level 1, {value}")
