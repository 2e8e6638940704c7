"""The wheel does the main job without the checkout."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from fixtures.nodes import EXAMPLES

if TYPE_CHECKING:
    from pathlib import Path

    from fixtures.wheel import Installed
    from torpor.config import Settings

pytestmark = pytest.mark.vm


def test_deploys_and_invokes(installed: Installed, imaged_settings: Settings) -> None:
    """A torpor from the wheel deploys `hello` and wakes it: the guest's agent came along."""
    function: Path = installed.elsewhere / "hello"
    shutil.copytree(EXAMPLES / "hello", function)
    home = imaged_settings.home
    deployed = installed.run("torpor", "--home", home, "deploy", function)
    assert deployed.returncode == 0, deployed.stderr
    answer = installed.run("torpor", "--home", home, "invoke", "hello")
    assert answer.returncode == 0, answer.stderr
    assert "hello" in answer.stdout.lower()
    removed = installed.run("torpor", "--home", home, "rm", "hello")
    assert removed.returncode == 0, removed.stderr
