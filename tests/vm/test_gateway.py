"""Functions that wake for a request and fall asleep again, through the gateway."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from fixtures.gateways import connected, listening_on, wait_for
from fixtures.nodes import write_function
from torpor.config import Settings
from torpor.node.tables import Recipes

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.gateway import Gateway
    from torpor.node.node import Node

pytestmark = pytest.mark.vm

COUNTER = """\
import http.server, itertools, os

count = itertools.count(1)

class Counter(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b"%d" % next(count)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("", int(os.environ["PORT"])), Counter).serve_forever()
"""


async def ask(gateway: Gateway, name: str = "counter") -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    async with connected(gateway) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: %b.localhost\r\n\r\n" % name.encode())
        status, _, body = await client.answer(limit_s=60)
    return status, body


async def test_sleeps_and_wakes(node: Node, tmp_path: Path) -> None:
    """Requests for a sleeping function share one wake; idle it is snapshotted and stopped.

    Woken again it goes on where it was, with the working set that it had. An instance that is
    killed is replaced. A function that was removed is unknown.
    """
    scale = '[scale]\nidle = "2s"\nmax = 1\nsnapshot = "on-idle"'
    deployed = await node.deploy(write_function(tmp_path / "counter", COUNTER, scale))
    journal = node.parts.journal
    async with listening_on(node, Settings()) as gateway:
        answers = await asyncio.gather(*(ask(gateway) for _ in range(8)))
        numbers = sorted(int(body) for _, body in answers)
        assert numbers == list(range(numbers[0], numbers[0] + 8))
        stats = gateway.stats().functions["counter"]
        assert (stats.wakes, stats.responses) == ({"local": 1}, {"2xx": 8})

        await wait_for(lambda: gateway.stats().functions["counter"].stopped == 1, limit_s=60)
        assert journal.instances() == []
        ref = journal.ref("counter")
        assert ref is not None
        assert ref.digest != deployed.captured.snapshot.digest
        asleep = node.parts.snapshots.get(ref.digest)
        assert asleep.working_set() == deployed.captured.snapshot.working_set() != ()
        assert Recipes(journal).get(ref.digest)  # with `--snapshots off` it can still be booted
        status, body = await ask(gateway)
        assert (status, int(body)) == (200, numbers[-1] + 1)

        (row,) = journal.instances()
        assert row.vmm is not None
        row.vmm.kill()
        await wait_for(lambda: not gateway.stats().functions["counter"].instances)
        status, body = await ask(gateway)
        assert (status, int(body)) == (200, numbers[-1] + 1)  # of the last snapshot

        await node.remove_function("counter")
        status, body = await ask(gateway)
        assert status == 404
        assert "no function 'counter'" in json.loads(body)["detail"]
    assert journal.instances() == []
