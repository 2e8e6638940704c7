"""A command that is interrupted cleans up; one that is killed is cleaned up after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import EXAMPLES
from torpor.node.journal import Journal
from torpor.node.leftovers import find_leftovers

if TYPE_CHECKING:
    from torpor.config import Settings

pytestmark = [pytest.mark.vm, pytest.mark.chaos]

TORPOR = Path(sys.executable).with_name("torpor")


def start(settings: Settings, *arguments: str | Path) -> subprocess.Popen[str]:
    """A torpor command on a home."""
    return subprocess.Popen(
        [TORPOR, "--home", settings.home, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORPOR_STORE": settings.store},
    )


def wait_for_vmm(settings: Settings) -> None:
    """Until the journal has an instance with a VMM process."""
    deadline = 120 * 50
    for _ in range(deadline):
        journal = settings.home / "journal.sqlite"
        if journal.exists() and any(row.vmm for row in Journal(journal).instances()):
            return
        signal.sigtimedwait([], 0.02)
    raise AssertionError("no VM was started")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_deploy_leaves_nothing(
    imaged_settings: Settings, signum: signal.Signals
) -> None:
    """Ctrl-C (and SIGTERM) in the middle of a deploy: exit 130, nothing on the host."""
    command = start(imaged_settings, "deploy", EXAMPLES / "hello")
    wait_for_vmm(imaged_settings)
    command.send_signal(signum)
    _, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert find_leftovers(imaged_settings) == []
    assert Journal(imaged_settings.home / "journal.sqlite").instances() == []


def test_killed_deploy_is_cleaned_up_by_ps(imaged_settings: Settings) -> None:
    """SIGKILL in the middle of a deploy, then `torpor ps`: nothing of it is left."""
    command = start(imaged_settings, "deploy", EXAMPLES / "hello")
    wait_for_vmm(imaged_settings)
    command.kill()
    command.communicate(timeout=60)
    assert find_leftovers(imaged_settings) != []
    listing = start(imaged_settings, "ps", "--json")
    out, err = listing.communicate(timeout=60)
    assert listing.returncode == 0, err
    assert json.loads(out) == []
    assert find_leftovers(imaged_settings) == []


def test_killed_vmm_of_a_kept_instance_is_cleaned_up_by_ps(deployed: Settings) -> None:
    """A VM that died by itself is gone from `torpor ps`, and so is all it had."""
    waking = start(deployed, "restore", "hello", "--json")
    out, err = waking.communicate(timeout=60)
    assert waking.returncode == 0, err
    (row,) = Journal(deployed.home / "journal.sqlite").instances()
    assert row.id in out
    assert row.vmm is not None
    row.vmm.kill()
    listing = start(deployed, "ps", "--json")
    out, err = listing.communicate(timeout=60)
    assert json.loads(out) == [], err
    assert find_leftovers(deployed) == []
