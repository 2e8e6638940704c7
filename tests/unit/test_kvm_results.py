"""No result of a level-1 VM is lost: what did not come back is a failure that says why."""

from __future__ import annotations

import threading

import pytest

from kvm.results import LostResultError, Results


def phase(test: str, when: str) -> dict[str, object]:
    """A report as `kvm.reporting` sends it, of one phase."""
    return {"report": {"nodeid": test, "when": when}}


def test_result_is_there_when_its_teardown_is_over() -> None:
    """A test waits for all phases of its own, whatever came of others, and gets them in order."""
    results = Results()
    for when in ("setup", "call"):
        results.take_report(phase("a", when))
        results.take_report(phase("b", when))
    results.take_report(phase("b", "teardown"))
    assert [report["when"] for report in results.wait("b")] == ["setup", "call", "teardown"]
    late = threading.Timer(0.05, results.take_report, (phase("a", "teardown"),))
    late.start()
    assert len(results.wait("a")) == 3
    late.join()


def test_result_that_came_before_the_end_counts() -> None:
    """A VM that dies costs nobody what had come already."""
    results = Results()
    results.take_report({"begins": "a"})
    results.take_report(phase("a", "teardown"))
    results.take_report({"begins": "b"})
    results.take_output(b"the last line\n")
    results.end("it ended by itself\nKernel panic")
    assert results.wait("a")
    with pytest.raises(LostResultError, match="while this test ran") as lost:
        results.wait("b")
    assert "the last line" in str(lost.value)
    assert "Kernel panic" in str(lost.value)
    with pytest.raises(LostResultError, match="the last one that began was b"):
        results.wait("c")


def test_problem_of_the_collection_is_told() -> None:
    """Tests that level 1 cannot collect fail with the reason."""
    results = Results()
    results.take_report({"problem": "ImportError: no such thing"})
    results.end("its pytest ended with exit code 2")
    with pytest.raises(LostResultError, match="no such thing"):
        results.wait("a")


def test_stopped_vm_is_started_anew_for_what_is_missing() -> None:
    """What came of a test that was not over is forgotten; the test is run from its start."""
    results = Results()
    for when in ("setup", "call", "teardown"):
        results.take_report(phase("a", when))
    results.take_report({"begins": "b"})
    results.take_report(phase("b", "setup"))
    assert results.missing(["a", "b", "c"]) == ["b", "c"]
    results.restart()
    assert results.restarts == ["level 1 stopped while b ran; started anew"]
    for when in ("setup", "call", "teardown"):
        results.take_report(phase("b", when))
    assert len(results.wait("a")) == len(results.wait("b")) == 3
