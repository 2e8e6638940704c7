"""Requests made up from the OpenAPI document: none of them makes the daemon fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .conftest import TOKEN

if TYPE_CHECKING:
    from fixtures.daemons import DaemonProcess

pytestmark = pytest.mark.slow

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def test_no_made_up_request_is_our_fault(lasting: DaemonProcess, tmp_path: Path) -> None:
    """Whatever fits the schema, and what does not quite: no 5xx, and it answers on.

    The stream of events is left out, for it does not end.
    """
    host, port = lasting.tcp_address()
    done = subprocess.run(
        [
            str(SCHEMATHESIS),
            "run",
            f"http://{host}:{port}/v1/openapi.json",
            "--header",
            f"Authorization: Bearer {TOKEN}",
            "--checks=not_a_server_error",
            "--mode=all",
            "--phases=examples,coverage,fuzzing",
            "--max-examples=5",
            "--seed=1",
            "--exclude-path=/v1/events",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Traceback" not in lasting.said()
    with lasting.client() as client:
        assert client.instances() == []  # made-up snapshots do not wake; some were deleted
        assert client.status().pending == ()
