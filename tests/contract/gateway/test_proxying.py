"""What a gateway does with requests and responses, against real servers on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fixtures.gateways import (
    Client,
    Function,
    TestFleet,
    answer_count,
    connected,
    fields_of,
    listening,
    read_body,
    read_head,
    serving,
    wait_for,
)
from torpor.config import Settings
from torpor.errors import HostUnfit, InvalidInput, VmmFailed
from torpor.gateway.fleet import Ready
from torpor.snapshot.manifest import Scale

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from torpor.gateway import Gateway

GET = b"GET /f/hello/ HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
async def function() -> AsyncIterator[Function]:
    """A function that counts its requests."""
    async with serving() as function:
        yield function


@pytest.fixture
def fleet(function: Function) -> TestFleet:
    """A fleet with it as `hello`, asleep."""
    fleet = TestFleet()
    fleet.deploy("hello", function.port, Scale())
    return fleet


@pytest.fixture
async def gateway(fleet: TestFleet) -> AsyncIterator[Gateway]:
    """A gateway over it."""
    async with listening(fleet) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[Client]:
    """A client of the gateway."""
    async with connected(gateway) as client:
        yield client


async def test_request_wakes_and_connections_are_kept(
    client: Client, function: Function, fleet: TestFleet
) -> None:
    """Many requests on one connection: one wake, one connection to the function, in order."""
    for number in range(1, 6):
        client.send(GET)
        assert (await client.answer())[::2] == (200, b"%d" % number)
    assert (fleet.began, function.connections) == (["hello"], 1)


async def test_pipelined_requests_are_answered_in_order(client: Client, function: Function) -> None:
    """Those that come together reach the function one after the other."""
    client.send(GET * 5)
    assert [(await client.answer())[2] for _ in range(5)] == [b"1", b"2", b"3", b"4", b"5"]
    assert len(function.heads) == 5


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 11\r\n\r\nhello world",
        b"Transfer-Encoding: chunked\r\n\r\n6;ext=1\r\nhello \r\n5\r\nworld\r\n0\r\nX-T: y\r\n\r\n",
    ],
)
async def test_bodies_of_requests(client: Client, function: Function, body: bytes) -> None:
    """They arrive whole in either framing, cut into single bytes or not; the next request too."""
    head = b"POST /f/hello/ HTTP/1.1\r\nHost: x\r\n"
    client.send(head + body)
    assert (await client.answer())[0] == 200
    for at in range(len(head + body)):
        client.send((head + body)[at : at + 1])
        await asyncio.sleep(0)
    assert (await client.answer())[0] == 200
    assert function.bodies == [b"hello world"] * 2
    assert b"x-t" not in function.heads[0].lower()


async def _chunks(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    if b"until-close" in head:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nto the end")
        await writer.drain()
        writer.close()
        return
    writer.write(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: X-Hop\r\nX-Hop: 1\r\n\r\n"
        b"5;x\r\nhello\r\n1\r\n!\r\n0\r\nX-Trailer: 1\r\n\r\n"
    )


async def test_framings_of_responses() -> None:
    """Chunks stay chunks for HTTP/1.1 and end with the connection for 1.0; 1xx are passed on."""
    fleet = TestFleet()
    async with serving(_chunks) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(GET)
            assert (await client.answer())[0] == 100
            status, fields, _ = await client.answer()
            assert (status, fields["link"]) == (103, "a")
            status, fields, body = await client.answer()
            assert (status, body, fields["connection"]) == (200, b"hello!", "keep-alive")
            assert "x-hop" not in fields
            client.send(GET.replace(b"/f/hello/", b"/f/hello/until-close"))
            assert (await client.answer())[2] == b"to the end"
            client.send(GET.replace(b"1.1", b"1.0"))
            head = await read_head(client.reader)
            assert fields_of(head)["connection"] == "close"
            assert "transfer-encoding" not in fields_of(head)
            assert await client.reader.read() == b"hello!"


async def _head_only(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    status = b"204 No Content" if b"/none" in head else b"200 OK"
    length = b"" if b"/none" in head else b"Content-Length: 1000\r\n"
    writer.write(b"HTTP/1.1 %b\r\n%b\r\n" % (status, length))


async def test_responses_without_a_body() -> None:
    """After a HEAD or a 204 both connections go on; the length of a HEAD is passed on."""
    fleet = TestFleet()
    async with serving(_head_only) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            for _ in range(3):
                client.send(GET.replace(b"GET", b"HEAD"))
                status, fields, _ = await client.answer(method=b"HEAD")
                assert (status, fields["content-length"]) == (200, "1000")
                client.send(GET.replace(b"/f/hello/", b"/f/hello/none"))
                assert (await client.answer())[0] == 204
        assert function.connections == 1


async def _endless(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await writer.drain()


async def test_slow_reader_holds_the_function() -> None:
    """A client that does not read stops the function's sending; when it leaves, so does ours."""
    fleet = TestFleet()
    async with serving(_endless) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(GET)
            await read_head(client.reader)
            (held,) = gateway.connections
            await wait_for(lambda: held.full)
            size = held._transport.get_write_buffer_size()
            await asyncio.sleep(0.1)
            assert held._transport.get_write_buffer_size() == size < 1 << 20
            assert not function.lost.is_set()
        async with asyncio.timeout(20):
            await function.lost.wait()


@pytest.mark.slow
async def test_slow_function_holds_the_client() -> None:
    """What the function does not take is not kept: the client's sending stops.

    A client that leaves meanwhile is noticed at the deadline.
    """
    fleet = TestFleet()
    done = asyncio.Event()

    async def deaf(
        function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
    ) -> None:
        await done.wait()

    async with serving(deaf) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale(deadline_ms=2000))
        async with connected(gateway) as client:
            client.send(b"POST /f/hello/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            await wait_for(lambda: function.heads)
            (held,) = gateway.connections
            sent = 0
            while not held._holds:
                client.send(bytes(1 << 16))
                sent += 1 << 16
                await asyncio.sleep(0)
            assert sent < 64 << 20
            client.writer.transport.abort()
            await wait_for(lambda: not gateway.connections)
        done.set()
        await wait_for(lambda: function.lost.is_set())


async def test_client_that_leaves_is_told_to_the_function(gateway: Gateway) -> None:
    """Its connection ends before it has answered."""
    left = asyncio.Event()

    async def wait_for_end(
        function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
    ) -> None:
        assert await reader.read() == b""
        left.set()

    async with serving(wait_for_end) as slow, listening(TestFleet()) as other:
        other._fleet.deploy("hello", slow.port, Scale())  # type: ignore[attr-defined]
        async with connected(other) as client:
            client.send(GET)
            await wait_for(lambda: slow.heads)
        async with asyncio.timeout(20):
            await left.wait()
        await wait_for(lambda: other.stats().functions["hello"].in_flight == 0)


async def test_truncated_body_is_not_completed(gateway: Gateway, function: Function) -> None:
    """A client that ends within its body leaves the function with an end, not with a request."""
    async with connected(gateway) as client:
        client.send(b"POST /f/hello/ HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhello")
        await wait_for(lambda: function.heads)
    async with asyncio.timeout(20):
        await function.lost.wait()
    assert function.bodies == []


async def _truncating(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    if b"/short" in head:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    elif b"/garbage" in head:
        writer.write(b"SMTP ready\r\n\r\n")
    elif b"/both" in head:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        )
    elif b"/switch" in head:
        writer.write(
            b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nsmuggled"
        )
    elif b"/large" in head:
        writer.write(b"HTTP/1.1 200 OK\r\nX: " + bytes(1 << 20).replace(b"\0", b"a"))
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("path", ["nothing", "garbage", "both", "switch", "large"])
async def test_answers_that_are_none(path: str) -> None:
    """502 as a problem, once: a request that was sent is never sent again."""
    fleet = TestFleet()
    async with serving(_truncating) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(GET.replace(b"/f/hello/", b"/f/hello/" + path.encode()))
            status, fields, body = await client.answer()
        assert (status, fields["content-type"]) == (502, "application/problem+json")
        assert json.loads(body)["type"] == "urn:torpor:problem:function-failed"
        assert len(function.heads) == 1


async def test_response_that_is_cut_off_is_cut_off() -> None:
    """The client sees that the rest is missing."""
    fleet = TestFleet()
    async with serving(_truncating) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(GET.replace(b"/f/hello/", b"/f/hello/short"))
            head = await read_head(client.reader)
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await read_body(client.reader, head)
        assert gateway.stats().functions["hello"].responses == {"lost": 1}


async def _early(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
    await writer.drain()
    await reader.read(1000)


async def test_answer_before_the_end_of_the_body() -> None:
    """It is passed on, and the connection ends with it."""
    fleet = TestFleet()
    async with serving(_early) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(b"POST /f/hello/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
            status, fields, body = await client.answer()
            assert (status, body, fields["connection"]) == (413, b"no", "close")
            assert await client.ended()


async def test_dead_instance_is_replaced(
    client: Client, fleet: TestFleet, gateway: Gateway
) -> None:
    """Nothing was sent to it yet: the request goes to another instance, the dead one ends."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        fleet.instances["dead"] = Ready("dead", "hello", "one", "127.0.0.1", port)
        await wait_for(lambda: gateway.stats().functions["hello"].instances)
        client.send(GET)
        assert (await client.answer())[0] == 200
        await wait_for(lambda: fleet.stopped == ["dead"])
    assert fleet.began == ["hello"]


async def test_instance_that_dies_during_a_request(fleet: TestFleet) -> None:
    """A dead VM closes no connection: its requests are 502 as soon as it is known to be gone."""
    async with serving(_silent) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(GET)
            await wait_for(lambda: function.heads)
            fleet.instances.clear()
            assert (await client.answer())[0] == 502
    assert len(function.heads) == 1


async def test_function_that_takes_no_connections(client: Client, fleet: TestFleet) -> None:
    """After a few instances it is 502."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        fleet.ports["hello"] = unused.getsockname()[1]
        client.send(GET)
        status, _, body = await client.answer()
    assert (status, json.loads(body)["detail"]) == (502, "hello takes no connections")
    assert len(fleet.began) == 3


async def test_failed_wake_is_a_problem(client: Client, fleet: TestFleet) -> None:
    """With the id that was given, without what only the owner should see; the next one works."""
    fleet.errors = [VmmFailed("the VMM ended", reason="/var/secret")]
    client.send(GET.replace(b"\r\n\r\n", b"\r\nX-Request-Id: abc\r\n\r\n"))
    status, fields, body = await client.answer()
    assert (status, fields["x-request-id"]) == (503, "abc")
    assert json.loads(body) == {
        "type": "urn:torpor:problem:vmm-failed",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "the VMM ended",
        "instance": "urn:torpor:request:abc",
    }
    client.send(GET)
    assert (await client.answer())[0] == 200


async def test_unknown_function(client: Client) -> None:
    """404 that says so, and the connection goes on; nothing for a HEAD but the head."""
    for target in (b"/f/nobody/", b"/", b"/f/%00/"):
        client.send(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target)
        status, _, body = await client.answer()
        assert status == 404
        assert "function" in json.loads(body)["detail"]
    client.send(b"HEAD /f/nobody/ HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await client.answer(method=b"HEAD"))[0] == 404
    client.send(GET)
    assert (await client.answer())[0] == 200


async def test_full_queue_and_deadline(fleet: TestFleet, gateway: Gateway) -> None:
    """What may not wait is 503 with Retry-After at once; what waits too long is 504."""
    fleet.functions["hello"] = replace(
        fleet.functions["hello"], scale=Scale(concurrency=1, max=1, queue=1, deadline_ms=500)
    )
    fleet.gate = asyncio.Event()
    await gateway._scaler.look()
    async with connected(gateway) as one, connected(gateway) as two:
        one.send(GET)
        await wait_for(lambda: fleet.began)
        two.send(GET)
        status, fields, _ = await two.answer()
        assert (status, fields["retry-after"]) == (503, "1")
        assert (await one.answer())[0] == 504
        fleet.gate.set()
        one.send(GET)
        assert (await one.answer())[0] == 200


async def test_function_that_does_not_answer() -> None:
    """504 after the deadline, and the function sees that nobody waits any more."""
    fleet = TestFleet()
    async with serving(_silent) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale(deadline_ms=300))
        async with connected(gateway) as client:
            client.send(GET)
            status, _, body = await client.answer()
        assert (status, json.loads(body)["type"]) == (504, "urn:torpor:problem:deadline-exceeded")
        async with asyncio.timeout(20):
            await function.lost.wait()
        assert len(function.heads) == 1


async def _silent(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    await reader.read()


async def _socket(
    function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
) -> None:
    fields = fields_of(head)
    if fields.get("upgrade") != "websocket":
        await answer_count(function, reader, writer, head)
        return
    assert fields["connection"] == "Upgrade"
    writer.write(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: x\r\n\r\nfirst"
    )
    while data := await reader.read(65536):
        if data == b"bye":
            break
        writer.write(data.upper())
        await writer.drain()
    function.bodies.append(b"ended")
    writer.close()


UPGRADE = GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")


async def test_websocket() -> None:
    """Bytes go through as they are, both ways, early ones too; either side may end it."""
    fleet = TestFleet()
    async with serving(_socket) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(UPGRADE + b"early")
            fields = fields_of(await read_head(client.reader))
            assert (fields["upgrade"], fields["sec-websocket-accept"]) == ("websocket", "x")
            assert await client.reader.readexactly(10) == b"firstEARLY"
            for _ in range(3):
                client.send(b"a" * 100_000)
                assert await client.reader.readexactly(100_000) == b"A" * 100_000
            client.send(b"bye")
            assert await client.ended()
        async with connected(gateway) as client:
            client.send(UPGRADE)
            await read_head(client.reader)
            assert await client.reader.readexactly(5) == b"first"
        await wait_for(lambda: len(function.bodies) == 2)


async def test_websocket_to_a_function_that_has_none(client: Client) -> None:
    """Its ordinary answer is passed on, and the connection ends; another protocol is not passed."""
    client.send(UPGRADE.replace(b"websocket", b"h2c"))
    assert (await client.answer())[2] == b"1"
    client.send(UPGRADE + b"frame")
    assert (await client.answer())[2] == b"2"
    assert await client.ended()


async def test_concurrent_requests_share_one_wake(fleet: TestFleet, gateway: Gateway) -> None:
    """All are answered by the one instance."""
    fleet.gate = asyncio.Event()

    async def ask() -> int:
        async with connected(gateway) as client:
            client.send(GET)
            return (await client.answer())[0]

    asked = [asyncio.ensure_future(ask()) for _ in range(12)]
    await wait_for(lambda: gateway.stats().functions["hello"].queued == 12)
    fleet.gate.set()
    assert await asyncio.gather(*asked) == [200] * 12
    assert fleet.began == ["hello"]
    stats = gateway.stats().functions["hello"]
    assert (stats.wait.count, stats.duration.count, stats.responses) == (12, 12, {"2xx": 12})


async def test_drain(fleet: TestFleet, function: Function) -> None:
    """Requests under way are answered and their connections end; instances stay."""
    gate = asyncio.Event()

    async def slow(
        function: Function, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes
    ) -> None:
        await gate.wait()
        await answer_count(function, reader, writer, head)

    async with serving(slow) as other, listening(fleet) as gateway:
        fleet.deploy("hello", other.port, Scale(idle_ms=100))
        address = gateway.address
        async with connected(gateway) as busy, connected(gateway) as idle:
            busy.send(GET)
            await wait_for(lambda: other.heads)
            draining = asyncio.ensure_future(gateway.drain(deadline_s=20))
            assert await idle.ended()
            gate.set()
            status, fields, _ = await busy.answer()
            assert (status, fields["connection"]) == (200, "close")
            assert await busy.ended()
            await draining
            with pytest.raises(ConnectionError):
                await asyncio.open_connection(*address)
    assert len(fleet.instances) == 1


async def test_drain_that_takes_too_long(fleet: TestFleet) -> None:
    """What has not finished at the deadline is broken off."""
    async with serving(_silent) as function, listening(fleet) as gateway:
        fleet.deploy("hello", function.port, Scale())
        async with connected(gateway) as client:
            client.send(GET)
            await wait_for(lambda: function.heads)
            await gateway.drain(deadline_s=0.1)
            assert (await client.answer())[0] == 0


async def test_where_it_cannot_listen(fleet: TestFleet, gateway: Gateway) -> None:
    """A taken address is HostUnfit, what is no port InvalidInput."""
    from torpor.gateway import Gateway as Another

    with pytest.raises(HostUnfit, match="cannot listen"):
        await Another(fleet, Settings()).start(host="127.0.0.1", port=gateway.address[1])
    with pytest.raises(InvalidInput, match="not a port"):
        await Another(fleet, Settings()).start(host="127.0.0.1", port=70000)


async def test_client_that_resets(gateway: Gateway, function: Function) -> None:
    """A reset in the middle of a response leaves nothing behind."""
    async with connected(gateway) as client:
        client.send(GET)
        await client.answer()
        connection = client.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.send(GET)
        client.writer.transport.abort()
        await wait_for(lambda: not gateway.connections)
    await wait_for(lambda: gateway.stats().functions["hello"].in_flight == 0)
