"""A furnished home and a daemon on it, for the tests of a module that leave it as it is."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from fixtures.daemons import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fixtures.daemons import DaemonProcess
    from fixtures.homes import Furnished

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def lasting(
    template: Furnished, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """A daemon on TCP too, for the tests of a module that change nothing."""
    home = tmp_path_factory.mktemp("lasting") / "a"
    subprocess.run(["cp", "-a", template.home.path, home], check=True)
    quick = {"gateway_header_timeout_s": "2"}
    with daemon(home, "--api", "127.0.0.1:0", api_token=TOKEN, **quick) as running:
        yield running


@pytest.fixture
def served(a: Furnished) -> Iterator[DaemonProcess]:
    """A daemon on that home."""
    with daemon(a.home.path) as running:
        yield running
