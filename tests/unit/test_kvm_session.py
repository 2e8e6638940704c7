"""A VM of tests that stops is followed by one more, for what it has not told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from kvm import session
from kvm.results import LostResultError
from kvm.session import Group, KvmSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm.disks import Job

GROUP = Group("some", (), {})


class Stopping:
    """A level 1 that tells of as many tests as are left in `tells`, and stops before the next."""

    tells: list[int]
    given: list[list[str]]
    code = 0
    console = "Linux version 6.12"

    def __init__(
        self, job: Job, work: Path, *, on_report: Callable[[dict[str, Any]], object], **_: object
    ) -> None:
        self._tests = job.files["job/tests"].read_text().split()
        self._on_report = on_report
        self.given.append(self._tests)
        self.is_silent = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def wait(self, *_: object, **__: object) -> bool:
        """Run them."""
        told = self.tells.pop(0)
        for test in self._tests[:told]:
            self._on_report({"begins": test})
            self._on_report({"report": {"nodeid": test, "when": "teardown"}})
        self.is_silent = told < len(self._tests)
        if self.is_silent:
            self._on_report({"begins": self._tests[told]})
        return not self.is_silent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., KvmSession]:
    """Run a, b and c in VMs that tell of so many each."""
    monkeypatch.setattr(session, "make_images", lambda: Path("/images"))
    monkeypatch.setattr(session, "Level1", Stopping)

    def begin(*tells: int) -> KvmSession:
        Stopping.tells, Stopping.given = list(tells), []
        return KvmSession({GROUP: ["a", "b", "c"]})

    return begin


def test_missing_tests_are_run_in_one_more(run: Callable[..., KvmSession]) -> None:
    """What was told before the stop is not run again; that it stopped is told."""
    made = run(1, 2)
    assert all(made.wait(GROUP, test) for test in "abc")
    made.close()
    assert Stopping.given == [["a", "b", "c"], ["b", "c"]]
    assert made.restarts == ["level 1 stopped while b ran; started anew"]


def test_what_stops_each_of_them_fails(run: Callable[..., KvmSession]) -> None:
    """A test under which a second VM stops has no result, nor what comes after it."""
    made = run(1, 0)
    assert made.wait(GROUP, "a")
    with pytest.raises(LostResultError, match=r"(?s)while this test ran.*stopped, 2 times"):
        made.wait(GROUP, "b")
    with pytest.raises(LostResultError, match="before this test"):
        made.wait(GROUP, "c")
    made.close()
    assert len(Stopping.given) == 2


def test_vm_that_ends_is_not_started_anew(run: Callable[..., KvmSession]) -> None:
    """Only a stop is repeated: here pytest ended, and a and b and c are told."""
    made = run(3)
    assert all(made.wait(GROUP, test) for test in "abc")
    made.close()
    assert (len(Stopping.given), made.restarts) == (1, [])
