"""Signals to a daemon that has just been started."""

from __future__ import annotations

import signal
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fixtures.commands import hears_signals, wait_until
from fixtures.daemons import DaemonProcess

if TYPE_CHECKING:
    from fixtures.homes import Furnished

pytestmark = pytest.mark.slow

_DELAYS_S = (0.0, 0.3, 0.7, 1.2)
"""After its handlers are set; it serves after about 1.2 s on an idle machine."""


def test_signals_while_it_starts(a: Furnished) -> None:
    """Whenever the first comes, also with more behind it, the daemon ends as it does later.

    It leaves nothing behind that hinders the next one.
    """
    served = DaemonProcess(a.home.path)

    for number, delay_s in enumerate(_DELAYS_S):
        process = served.spawn()
        wait_until(partial(hears_signals, process))
        time.sleep(delay_s)
        assert number or not served.socket.exists()
        for signum in (signal.SIGTERM, signal.SIGINT)[number % 2 :]:
            process.send_signal(signum)
        assert process.wait(timeout=30) == 0, served.said()
        assert not served.socket.exists()
    assert "Traceback" not in served.said(), served.said()
    assert "Error" not in served.said(), served.said()
    served.start()
    assert served.stop() == 0
