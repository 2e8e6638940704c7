"""A command that is interrupted cleans up; one that is killed is cleaned up after."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import end, hears_signals, journal_of, run_torpor, start, wait_until
from fixtures.nodes import EXAMPLES, write_function
from torpor.node.leftovers import find_leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torpor.config import Settings
    from torpor.node.journal_rows import InstanceRow

pytestmark = [pytest.mark.vm, pytest.mark.chaos]


def has_vmm(settings: Settings) -> bool:
    """Whether the journal has an instance with a VMM process."""
    journal = settings.home / "journal.sqlite"
    return journal.exists() and any(row.vmm for row in journal_of(settings).instances())


def is_running(settings: Settings) -> bool:
    """Whether an instance is ready."""
    return any(row.state == "running" for row in journal_of(settings).instances())


@pytest.fixture
def kept(deployed: Settings) -> Iterator[InstanceRow]:
    """A running instance of hello that the test must leave running; it is stopped afterwards."""
    run_torpor(deployed, "restore", "hello", "--json")
    (row,) = journal_of(deployed).instances()
    yield row
    run_torpor(deployed, "stop", row.id)
    assert find_leftovers(deployed) == []


def paused_by(settings: Settings, row: InstanceRow) -> subprocess.Popen[str]:
    """A `snapshot create` that has paused the instance and stays so."""
    command = start(settings, "snapshot", "create", row.id, "--name", "cut-off", barrier=True)
    assert command.stdout is not None
    assert command.stdout.readline() == "AT THE BARRIER\n"
    return command


def assert_answers(settings: Settings, row: InstanceRow) -> None:
    """The very same instance answers."""
    answer = json.loads(run_torpor(settings, "invoke", "hello", "--json"))
    assert (answer["status"], answer["instance"]) == (200, row.id)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_deploy_leaves_nothing(
    imaged_settings: Settings, signum: signal.Signals
) -> None:
    """Ctrl-C (and SIGTERM) in the middle of a deploy: exit 130, nothing on the host."""
    command = start(imaged_settings, "deploy", EXAMPLES / "hello")
    wait_until(lambda: has_vmm(imaged_settings))
    command.send_signal(signum)
    code, _, err = end(command)
    assert code == 130, err
    assert find_leftovers(imaged_settings) == []
    assert journal_of(imaged_settings).instances() == []


def test_impatient_interruption_of_a_deploy_leaves_nothing(imaged_settings: Settings) -> None:
    """Ctrl-C again and again, while the first one is being obeyed: the same."""
    command = start(imaged_settings, "deploy", EXAMPLES / "hello")
    wait_until(lambda: has_vmm(imaged_settings))
    while command.poll() is None:
        command.send_signal(signal.SIGINT)
        signal.sigtimedwait([], 0.005)
    code, _, err = end(command)
    assert code == 130, err
    assert find_leftovers(imaged_settings) == []


def test_killed_deploy_is_cleaned_up_by_ps(imaged_settings: Settings) -> None:
    """SIGKILL in the middle of a deploy, then `torpor ps`: nothing of it is left."""
    command = start(imaged_settings, "deploy", EXAMPLES / "hello")
    wait_until(lambda: has_vmm(imaged_settings))
    command.kill()
    end(command)
    assert find_leftovers(imaged_settings) != []
    assert json.loads(run_torpor(imaged_settings, "ps", "--json")) == []
    assert find_leftovers(imaged_settings) == []


def test_killed_vmm_of_a_kept_instance_is_cleaned_up_by_ps(deployed: Settings) -> None:
    """A VM that died by itself is gone from `torpor ps`, and so is all it had."""
    out = run_torpor(deployed, "restore", "hello", "--json")
    (row,) = journal_of(deployed).instances()
    assert row.id in out
    assert row.vmm is not None
    row.vmm.kill()
    assert json.loads(run_torpor(deployed, "ps", "--json")) == []
    assert find_leftovers(deployed) == []


@pytest.mark.parametrize("delay_s", [twentieth / 20 for twentieth in range(12)])
def test_signal_at_any_time_of_a_restore(deployed: Settings, delay_s: float) -> None:
    """Whenever the signal comes: it is obeyed, and the instance gone, or it came too late."""
    signum = signal.SIGINT if round(delay_s * 20) % 2 else signal.SIGTERM
    command = start(deployed, "restore", "hello", "--json")
    wait_until(lambda: hears_signals(command))  # before that, Python is still starting
    signal.sigtimedwait([], delay_s)
    command.send_signal(signum)
    code, out, err = end(command)
    rows = journal_of(deployed).instances()
    if code == 0:
        assert [row.id for row in rows] == [json.loads(out)["instance"]]
        run_torpor(deployed, "stop", rows[0].id)
    else:
        assert code == 130, err
        assert rows == []
    assert find_leftovers(deployed) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_restore_wait_ends_its_instance(
    deployed: Settings, signum: signal.Signals
) -> None:
    """`restore --wait` ends with Ctrl-C or SIGTERM, exit 130, and its instance with it."""
    command = start(deployed, "restore", "hello", "--wait")
    assert command.stdout is not None
    assert any("http://" in line for line in iter(command.stdout.readline, ""))
    command.send_signal(signum)
    code, _, err = end(command)
    assert code == 130, err
    assert journal_of(deployed).instances() == []
    assert find_leftovers(deployed) == []


def test_killed_restore_wait_is_cleaned_up_by_ps(deployed: Settings) -> None:
    """An instance that was to end with its command does so too when that is killed."""
    command = start(deployed, "restore", "hello", "--wait")
    wait_until(lambda: is_running(deployed))
    command.kill()
    end(command)
    assert json.loads(run_torpor(deployed, "ps", "--json")) == []
    assert find_leftovers(deployed) == []


def test_two_removers_and_an_interruption(deployed: Settings) -> None:
    """`restore --wait` that is interrupted and two `stop` of its instance: all do their part."""
    command = start(deployed, "restore", "hello", "--wait")
    wait_until(lambda: is_running(deployed))
    (row,) = journal_of(deployed).instances()
    stops = [start(deployed, "stop", row.id) for _ in range(2)]
    wait_until(lambda: not is_running(deployed))
    command.send_signal(signal.SIGINT)
    assert end(command)[0] in (0, 130)  # 0: its instance had ended before it heard the signal
    results = [end(stop) for stop in stops]
    # who came when it was all over finds no such instance
    assert all(code == 0 or (code == 3 and "no instance" in err) for code, _, err in results)
    assert any(code == 0 for code, _, _ in results)
    assert journal_of(deployed).instances() == []
    assert find_leftovers(deployed) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_snapshot_lets_the_instance_go_on(
    deployed: Settings, kept: InstanceRow, signum: signal.Signals
) -> None:
    """Ctrl-C inside the pause: exit 130, no snapshot, the user's instance runs on."""
    command = paused_by(deployed, kept)
    command.send_signal(signum)
    code, _, err = end(command)
    assert code == 130, err
    assert journal_of(deployed).ref("cut-off") is None
    assert not list((deployed.home / "snapshots").glob(".*"))
    assert_answers(deployed, kept)


def test_impatient_interruption_of_a_snapshot(deployed: Settings, kept: InstanceRow) -> None:
    """The same when Ctrl-C comes again and again."""
    command = paused_by(deployed, kept)
    while command.poll() is None:
        command.send_signal(signal.SIGINT)
        signal.sigtimedwait([], 0.005)
    assert end(command)[0] == 130
    assert_answers(deployed, kept)


def test_killed_snapshot_lets_the_instance_go_on(deployed: Settings, kept: InstanceRow) -> None:
    """SIGKILL inside the pause: the next command, whichever it is, resumes the instance."""
    command = paused_by(deployed, kept)
    command.kill()
    end(command)
    run_torpor(deployed, "ls")
    assert not list((deployed.home / "snapshots").glob(".*"))
    assert_answers(deployed, kept)


def test_stop_waits_for_a_snapshot(deployed: Settings) -> None:
    """`stop` of an instance that is being snapshotted comes after that; a second one is refused."""
    run_torpor(deployed, "restore", "hello")
    (row,) = journal_of(deployed).instances()
    command = paused_by(deployed, row)
    code, _, err = end(start(deployed, "snapshot", "create", row.id, "--name", "second"))
    assert (code, "is being snapshotted" in err) == (4, True), err
    stop = start(deployed, "stop", row.id)
    with pytest.raises(subprocess.TimeoutExpired):
        stop.wait(timeout=1)
    command.send_signal(signal.SIGINT)
    assert end(command)[0] == 130
    assert end(stop)[0] == 0
    assert find_leftovers(deployed) == []


def test_interrupted_invoke_of_a_silent_function(
    deployed: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a function keeps its caller waiting is obeyed at once."""
    program = "import socket, time; s = socket.create_server(('', 8080)); time.sleep(9999)"
    run_torpor(deployed, "deploy", write_function(tmp_path / "silent", program, "warmup = []"))
    monkeypatch.setenv("TORPOR_REQUEST_TIMEOUT_S", "140")
    command = start(deployed, "invoke", "silent")
    wait_until(lambda: has_vmm(deployed))
    signal.sigtimedwait([], 1.0)
    command.send_signal(signal.SIGINT)
    command.wait(timeout=60)
    assert end(command)[0] == 130
    run_torpor(deployed, "rm", "silent")
    assert find_leftovers(deployed) == []


def test_interrupted_reading_of_a_body(deployed: Settings) -> None:
    """Ctrl-C while `invoke -d @-` waits for the rest of its standard input is obeyed."""
    reading, writing = os.pipe()
    try:
        command = start(deployed, "invoke", "hello", "-d", "@-", stdin=reading)
        os.write(writing, b"half")
        wait_until(lambda: unread_bytes(reading) == 0)
        command.send_signal(signal.SIGINT)
        assert end(command)[0] == 130
    finally:
        os.close(reading)
        os.close(writing)


def unread_bytes(pipe: int) -> int:
    """How much is in a pipe (FIONREAD, ioctl_tty(2))."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
