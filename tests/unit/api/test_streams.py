"""Progress, events and idempotency inside the daemon."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING

import msgspec
import pytest

from torpor.api.idempotency import Once, fingerprint
from torpor.api.streams import QueueReporter, progress_lines, server_sent
from torpor.errors import Conflict, NoSpace, NotFound
from torpor.node.events import Events
from torpor.node.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path

    from torpor.node.parts import Reporter


async def test_progress_then_result() -> None:
    """What is said from any thread comes before the result, in its order."""

    async def work(reporter: Reporter) -> msgspec.Raw:
        reporter.say("one")
        await asyncio.to_thread(reporter.say, "two")
        for done in range(1000):
            reporter.step("packs", done, 1000)
        reporter.step("packs", 1000, 1000)
        return msgspec.Raw(b'{"x":1}')

    lines = [json.loads(line) async for line in progress_lines(work)]
    assert [line["progress"]["say"] for line in lines[:2]] == ["one", "two"]
    assert lines[-1] == {"result": {"x": 1}}
    steps = [line["progress"] for line in lines[2:-1]]
    assert steps[-1] == {"what": "packs", "done_bytes": 1000, "total_bytes": 1000}
    assert len(steps) < 100


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (NotFound("gone"), "NotFound", "gone"),
        (RuntimeError("oops"), "InternalError", "RuntimeError: oops"),
    ],
)
async def test_failures_are_problems(error: Exception, kind: str, words: str) -> None:
    """What was raised on purpose, and a bug, end the lines with a problem."""

    async def work(_reporter: Reporter) -> msgspec.Raw:
        raise error

    (line,) = [json.loads(line) async for line in progress_lines(work)]
    assert line["problem"]["type"] == f"urn:torpor:error:{kind}"
    assert words in (line["problem"]["detail"] + line["problem"]["reason"])


async def test_leaving_early_cancels_and_waits() -> None:
    """A client that goes away has the work undone before its request ends."""
    undone = asyncio.Event()

    async def work(reporter: Reporter) -> msgspec.Raw:
        reporter.say("begun")
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            undone.set()
        raise AssertionError

    lines = progress_lines(work)
    assert b"begun" in await anext(lines)
    await lines.aclose()  # type: ignore[attr-defined]
    assert undone.is_set()


async def test_steps_of_several_things() -> None:
    """The first step of each thing is told at once."""
    queue: asyncio.Queue[dict[str, object] | None] = asyncio.Queue()
    reporter = QueueReporter(queue)
    for what in ("a", "b"):
        reporter.step(what, 0, None)
        reporter.step(what, 1, None)
    await asyncio.sleep(0)
    assert queue.qsize() == 2


async def test_events_from_threads() -> None:
    """Each subscriber gets every event once, those before it only if it asks for them."""
    events = Events()
    events.publish("k", "before")
    with events.subscribed() as new, events.subscribed(after=0) as all_of_them:
        thread = threading.Thread(target=lambda: events.publish("k", "after", number=1))
        thread.start()
        thread.join()
        assert (await new.get()).subject == "after"
        assert [(await all_of_them.get()).subject for _ in range(2)] == ["before", "after"]
    events.publish("k", "later")
    assert new.empty()
    assert [event.id for event in events.since(1)] == [2, 3]


async def test_server_sent_events() -> None:
    """The id comes first, so that a client can go on after it."""
    events = Events()
    with events.subscribed() as queue:
        stream = server_sent(queue)
        assert (await anext(stream)).startswith(b":")
        events.publish("function.deployed", "hello", snapshot="s")
        lines = (await anext(stream)).decode().splitlines()
        await stream.aclose()  # type: ignore[attr-defined]
    assert lines[:2] == ["id: 1", "event: function.deployed"]
    assert json.loads(lines[2].removeprefix("data: "))["data"] == {"snapshot": "s"}


def test_events_are_forgotten() -> None:
    """The memory is bounded; ids go on."""
    events = Events()
    for number in range(2500):
        events.publish("k", str(number))
    kept = events.since()
    assert (len(kept), kept[-1].id) == (1000, 2500)


async def test_requests_are_done_once(tmp_path: Path) -> None:
    """Repeats get the first answer, from a daemon that was started later too."""
    journal = Journal(tmp_path / "journal.sqlite")
    done: list[int] = []

    async def work() -> object:
        done.append(len(done))
        return {"number": len(done)}

    once = Once(journal)
    asked = fingerprint("POST", "/x", b"{}")
    first = await once.do("key", asked, work)
    assert await once.do("key", asked, work) == first
    assert await Once(journal).do("key", asked, work) == first
    assert await once.do(None, asked, work) != first
    assert len(done) == 2
    with pytest.raises(Conflict, match="another request"):
        await once.do("key", fingerprint("POST", "/x", b"[]"), work)


async def test_requests_at_the_same_time(tmp_path: Path) -> None:
    """While one is under way its repeat is refused; after a failure it may be done again."""
    once = Once(Journal(tmp_path / "journal.sqlite"))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def fail() -> object:
        begun.set()
        await go_on.wait()
        raise NoSpace("full")

    async def succeed() -> object:
        return 1

    task = asyncio.ensure_future(once.do("key", "r", fail))
    await begun.wait()
    with pytest.raises(Conflict, match="under way"):
        await once.do("key", "r", succeed)
    go_on.set()
    with pytest.raises(NoSpace):
        await task
    assert await once.do("key", "r", succeed) == msgspec.Raw(b"1")
