"""`torpor bench crowd`: many wakes at once on a node that has nothing, from a store that is far.

One snapshot many times, whose bytes are to come once; and many functions, which are to be no more
work each than alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from torpor.bench.asking import get
from torpor.bench.cpu import node_cpu_s
from torpor.bench.far import DELAY_S, FarStore, far_store
from torpor.bench.link import inside
from torpor.bench.report import Report, at_most, host_parameters
from torpor.bench.subjects import subjects_of
from torpor.errors import DeadlineExceeded, FunctionFailed
from torpor.host.cancel import entered_in_thread, in_thread
from torpor.node.node import Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from torpor.bench.subjects import Subjects
    from torpor.node.live import Instance

CLONES: Final = 16
FUNCTIONS: Final = 8
_WITHIN_S: Final = 240.0


async def bench_crowd(
    node: Node,
    *,
    function: Path,
    runs: int,
    minio: Path,
    clones: int = CLONES,
    functions: int = FUNCTIONS,
) -> Report:
    """Each round, each on a fresh node: one function, the same `clones` times, `functions` others.

    The round's function is another one each time. `bytes` are what the node's pager had from the
    store once all was pushed, `cpu` is of commands, VMMs, pager and keeper until then. Raises
    DeadlineExceeded when a crowd does not answer, as if each waited for the other.
    """
    report = Report(
        "crowd",
        {
            **host_parameters(),
            "cpus": os.cpu_count(),
            "function": str(function),
            "clones": clones,
            "functions": functions,
            "get_delay_s": DELAY_S,
            "runs": runs,
            "load_at_begin": [round(load, 1) for load in os.getloadavg()],
        },
    )
    made = subjects_of(node, function=function, generations=0, vms=True, count=functions)
    async with made as subjects, entered_in_thread(_far(node, minio)) as store:
        assert subjects is not None
        report.parameters["link"] = store.link.to_dict()
        names = await in_thread(_push_all, store, subjects)
        for number in range(runs):
            node.parts.reporter.say(f"round {number + 1} of {runs}")
            one = names[number % len(names)]
            await _crowd(report, node, store, "one", [one])
            await _crowd(report, node, store, "clones", [one] * clones)
            await _crowd(report, node, store, "functions", names)
    report.compare("clones bytes", "one bytes", at_most(1.2))
    report.compare("clones cpu each", "one cpu each")
    report.compare("functions cpu each", "one cpu each", at_most(1.6))
    return report


def _far(node: Node, minio: Path) -> contextlib.AbstractContextManager[FarStore]:
    return far_store(minio, node.parts.settings.home)


def _push_all(store: FarStore, subjects: Subjects) -> list[str]:
    """Put all functions into the store; their refs."""
    names = []
    for subject in subjects.functions:
        function = subject.snapshot.manifest.function
        assert function is not None
        store.push(subject.snapshot, subject.images, base=subject.base, ref=function.name)
        names.append(function.name)
    return names


async def _crowd(
    report: Report, node: Node, store: FarStore, label: str, names: Sequence[str]
) -> None:
    """Wake these at once on a fresh node and ask each; put the samples down."""
    async with _fresh_node(node, store, label) as fresh, contextlib.AsyncExitStack() as stack:
        before = await in_thread(fresh.paging.client.counters)
        cpu_s = await in_thread(node_cpu_s, fresh)
        answers_s = await _answers(fresh, stack, names)
        await in_thread(_wait_pushed, fresh)
        cpu_s = await in_thread(node_cpu_s, fresh) - cpu_s
        after = await in_thread(fresh.paging.client.counters)
    for answer_s in answers_s:
        report.add(f"{label} answer", answer_s, "s")
    report.add(f"{label} last answer", max(answers_s), "s")
    report.add(f"{label} cpu each", cpu_s / len(names), "s")
    report.add(f"{label} bytes", after["store"]["bytes"] - before["store"]["bytes"], "bytes")
    requests = after["store"]["requests"] - before["store"]["requests"]
    report.add(f"{label} requests", requests, "requests")
    report.add(f"{label} bytes on demand", after["fetched"]["bytes"], "bytes")
    report.add(f"{label} pager peak", after["peak_bytes"], "bytes")


@contextlib.asynccontextmanager
async def _fresh_node(node: Node, store: FarStore, label: str) -> AsyncIterator[Node]:
    """A node that has nothing but a pager, which runs and knows the store; gone after the body."""
    home = store.directory / label
    settings = replace(store.settings(node.parts.settings, home), hydrate_bytes=0)
    try:
        async with Node.open(settings) as fresh:
            try:
                await in_thread(inside, store.link.node_side, fresh.paging.prepare)
                yield fresh
            finally:
                await in_thread(fresh.paging.client.stop)
    finally:
        await in_thread(shutil.rmtree, home, ignore_errors=True)


async def _answers(
    node: Node, stack: contextlib.AsyncExitStack, names: Sequence[str]
) -> list[float]:
    """Wake and ask all at once; seconds to each answer. The stack removes what was woken."""
    tasks = [asyncio.ensure_future(_wake(node, stack, name)) for name in names]
    try:
        async with asyncio.timeout(_WITHIN_S):
            return await asyncio.gather(*tasks)
    except TimeoutError:  # it has cancelled them
        missing = sum(task.cancelled() or not task.done() for task in tasks)
        raise DeadlineExceeded(
            f"{missing} of {len(names)} wakes at once have not answered within {_WITHIN_S:g} s"
        ) from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _wake(node: Node, stack: contextlib.AsyncExitStack, name: str) -> float:
    began = time.perf_counter()
    instance = await node.restore(name, kept=True)
    stack.push_async_callback(_destroy, node, instance)
    assert instance.function is not None
    try:
        await get((instance.address, instance.function.port), "/")
    except OSError as error:
        raise FunctionFailed(f"{name} did not answer", reason=str(error)) from None
    return time.perf_counter() - began


async def _destroy(node: Node, instance: Instance) -> None:
    await node.instances.destroy(instance.id, vmm=instance.vmm)


def _wait_pushed(node: Node) -> None:
    client = node.paging.client
    for digest in client.opened():
        if not client.wait_pushed(digest, timeout_s=_WITHIN_S):
            raise DeadlineExceeded(f"the working set of {digest[:12]} was not pushed")
