"""The level-1 VMs of one pytest session: a group of tests each."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm.disks import Job, named_programs
from kvm.guests import make_images
from kvm.machine import Level1
from kvm.results import Results

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEADLINE_S = 1200.0
TEST_S = 300
STUCK_S = 360
"""A test that goes on after TEST_S cannot be ended: level 1's pytest ends, with what it was at."""
STARTS = 2
"""What a VM whose kernel stopped has not told is run anew, once: it may be what stops it."""
_SHOWN = 3000


def count_places() -> int:
    """How many VMs may run at once: TORPOR_TEST_RIGS, or one on each processor."""
    return int(os.environ.get("TORPOR_TEST_RIGS") or os.cpu_count() or 1)


@dataclass(frozen=True)
class Group:
    """The tests of one VM: the variables that must name programs for them, their environment."""

    name: str
    needs: tuple[str, ...]
    environment: Mapping[str, str] = field(hash=False)

    @property
    def lacks(self) -> str:
        """The first that it needs and has not, or nothing."""
        return next((name for name in self.needs if not os.environ.get(name)), "")

    def placed(self) -> Group:
        """The group as it is run: with its like in one VM where no two run at once."""
        return replace(self, name="") if count_places() == 1 else self


class KvmSession:
    """Starts the VMs for the chosen tests at once; ends them on `close`, whatever they do."""

    def __init__(self, groups: Mapping[Group, Sequence[str]]) -> None:
        self._images = make_images()
        self._places = threading.Semaphore(count_places())
        self._closing = threading.Event()
        self._results = {group: Results() for group in groups}
        self._threads = [
            threading.Thread(target=self._run, args=(group, tests))
            for group, tests in groups.items()
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, group: Group, test: str) -> list[dict[str, Any]]:
        """As Results.wait."""
        return self._results[group].wait(test)

    @property
    def restarts(self) -> list[str]:
        """What was run anew, a line for each VM that had stopped."""
        return [line for results in self._results.values() for line in results.restarts]

    def close(self) -> None:
        """End what runs."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _run(self, group: Group, tests: Sequence[str]) -> None:
        results = self._results[group]
        why = "the session ended"
        try:
            with self._places:
                why = self._run_in_turn(group, tests)
        except Exception:
            why = f"level 1 cannot run\n{traceback.format_exc()}"
        finally:
            results.end(why)

    def _run_in_turn(self, group: Group, tests: Sequence[str]) -> str:
        results, why = self._results[group], "the session ended"
        deadline = time.monotonic() + DEADLINE_S
        for start in range(STARTS):
            if self._closing.is_set():
                break
            with tempfile.TemporaryDirectory(prefix="torpor-kvm-") as work:
                left = deadline - time.monotonic()
                silent, why = self._run_in(Path(work), group, results.missing(tests), left)
            if not silent:
                break
            if start + 1 < STARTS:
                results.restart()
        return why

    def _run_in(
        self, work: Path, group: Group, tests: Sequence[str], timeout_s: float
    ) -> tuple[bool, str]:
        results = self._results[group]
        (work / "tests").write_text("".join(f"{test}\n" for test in tests))
        job = make_job(work / "tests", self._images, group.environment)
        level1 = Level1(job, work, on_output=results.take_output, on_report=results.take_report)
        with level1:
            ended = level1.wait(timeout_s, cancelled=self._closing)
        said = level1.console[-_SHOWN:]
        if not ended and level1.is_silent:
            return True, f"its kernel stopped, {STARTS} times in turn\n{said}"
        if not ended:
            return False, f"its {DEADLINE_S:.0f} s are over\n{said}"
        if level1.code is None:
            return False, f"it ended by itself\n{said}"
        return False, f"its pytest ended with exit code {level1.code}"


def make_job(tests: Path, images: Path, extra: Mapping[str, str]) -> Job:
    """A pytest run of the tests that are named in a file, a line each."""
    programs, files = named_programs()
    environment = {
        "TORPOR_LEVEL": "1",
        "TORPOR_TEST_DEPLOYED": "ledger",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a third of pytest's start
        **programs,
        **extra,
    }
    command = [
        *("python", "-m", "pytest", "-p", "kvm.reporting", "-p", "no:cacheprovider"),
        *("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout"),
        *(f"--timeout={TEST_S}", "-o", f"faulthandler_timeout={STUCK_S}"),
        *("-o", "faulthandler_exit_on_timeout=true", "--durations=0", "-q", "@/rig/job/tests"),
    ]
    return Job(command, environment, {"job/tests": tests, **files}, images)
