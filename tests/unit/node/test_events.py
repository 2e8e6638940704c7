"""What a node remembers of what happened, and who hears it."""

from __future__ import annotations

import asyncio

from torpor.node.events import Event, Events


def test_memory_is_short() -> None:
    """The last 1000 are kept, numbered from 1; `since` gives those after a number."""
    events = Events()
    for number in range(1500):
        events.publish("kind", f"subject-{number}", number=number)
    kept = events.since()
    assert [event.id for event in kept] == list(range(501, 1501))
    assert (kept[0].subject, kept[0].data) == ("subject-500", {"number": 500})
    assert [event.id for event in events.since(1498)] == [1499, 1500]


async def test_subscribers_hear_in_order_from_any_thread() -> None:
    """What is remembered first, then what comes, each once; after the body nothing."""
    events = Events()
    for _ in range(3):
        events.publish("early", "x")
    with events.subscribed(after=1) as queue, events.subscribed() as new:
        await asyncio.to_thread(events.publish, "late", "x")
        got = [await queue.get() for _ in range(3)]
        assert [(event.id, event.kind) for event in got] == [
            (2, "early"),
            (3, "early"),
            (4, "late"),
        ]
        assert (await new.get()).id == 4
    events.publish("after", "x")
    await asyncio.sleep(0)
    assert queue.empty()


async def test_listener_that_does_not_listen_costs_little() -> None:
    """It misses the oldest."""
    events = Events()
    with events.subscribed() as queue:
        for _ in range(5000):
            events.publish("kind", "x")
        await asyncio.sleep(0)
        assert queue.qsize() == 4000
        assert (await queue.get()).id == 1001


def test_heard_in_the_publishers_thread() -> None:
    """During the body alone."""
    events, heard = Events(), list[Event]()
    with events.heard(heard.append):
        events.publish("one", "x")
    events.publish("two", "x")
    assert [event.kind for event in heard] == ["one"]
