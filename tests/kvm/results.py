"""What came back of the tests of one level-1 VM: a test's result, or why there is none."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 8000


class Results:
    """Filled by the threads of a VM, waited for by the session's."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._problems: list[str] = []
        self._begun = ""
        self._output = b""
        self._end: str | None = None
        self.restarts: list[str] = []
        """What `restart` noted, for people."""

    def take_report(self, message: dict[str, Any]) -> None:
        """A message of `kvm.reporting`."""
        with self._changed:
            if "report" in message:
                report = message["report"]
                self._reports[report["nodeid"]].append(report)
            elif "problem" in message:
                self._problems.append(message["problem"])
            elif "begins" in message:
                self._begun = message["begins"]
            self._changed.notify_all()

    def take_output(self, data: bytes) -> None:
        """What pytest printed."""
        with self._changed:
            self._output = (self._output + data)[-_SHOWN:]

    def missing(self, tests: Sequence[str]) -> list[str]:
        """Those that have no result."""
        with self._changed:
            return [test for test in tests if not self._is_over(test)]

    def restart(self) -> None:
        """The VM stopped, and another one will run what is missing: forget what came of that."""
        with self._changed:
            over = {test: reports for test, reports in self._reports.items() if self._is_over(test)}
            self._reports = defaultdict(list, over)
            place = f"while {self._begun} ran" if self._begun else "before its first test"
            self.restarts.append(f"level 1 stopped {place}; started anew")
            self._begun, self._output = "", b""

    def end(self, why: str) -> None:
        """Nothing more will come."""
        with self._changed:
            self._end = why
            self._changed.notify_all()

    def wait(self, test: str) -> list[dict[str, Any]]:
        """The reports of a test's phases, all of them once its teardown is over.

        Raises LostResultError when the VM ended before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(test) or self._end is not None)
            if self._is_over(test):
                return self._reports[test]
            raise LostResultError(self._describe_loss(test))

    def _is_over(self, test: str) -> bool:
        reports = self._reports.get(test)
        return bool(reports) and reports[-1]["when"] == "teardown"

    def _describe_loss(self, test: str) -> str:
        place = "while this test ran" if test == self._begun else "before this test"
        if test != self._begun and self._begun:
            place += f"; the last one that began was {self._begun}"
        output = self._output.decode(errors="replace")
        return "\n".join([f"level 1 ended {place}", *self._problems, output, self._end or ""])


class LostResultError(Exception):
    """A VM ended without the result of a test; says why."""
